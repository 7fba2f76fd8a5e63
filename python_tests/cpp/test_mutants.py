"""Faults planted in the shipped kernels are caught: by the simulator's checks, or because the
numbers come out wrong. One line of a kernel is changed at a time: a barrier or a wait is left out,
an order of memory is weakened, an operand is another one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from cases import Case
from mutants_of_attention import PREFIX_ATTENTION
from mutants_of_blocks import MASKED_BACKWARD, MASKED_FORWARD, SYMMETRIC_KL
from mutants_of_vocabulary import VOCABULARY
from mutate import NOTHING, Mutant, planted
from parity import Results, check, inputs_of
from ptx import simulator

pytestmark = pytest.mark.backend("cuda_sim")
GUARD = 1 << 16  # elements
MUTANTS = [*SYMMETRIC_KL, *MASKED_FORWARD, *MASKED_BACKWARD, *PREFIX_ATTENTION, *VOCABULARY]


def apart(values: Sequence[Any]) -> list[Any]:
    """Copies of inputs with memory on both sides that no kernel is given: what reads beside one of
    them never meets another tensor, which it may read.
    """

    def between_guards(value: Any) -> Any:
        if isinstance(value, list):
            return apart(value)
        if value is None:
            return None
        memory = value.new_zeros(value.numel() + 2 * GUARD)
        return memory[GUARD:-GUARD].view(value.shape).copy_(value)

    return [between_guards(value) for value in values]


def results(operator: str, case: Case, precision: str, seeds: tuple[int, ...]) -> list[Results]:
    """Of a case, under some orders of threads, held to the closeness rule."""
    # A kept log-sum-exp has a rounding that symmetric_kl's reference has not.
    second = "eager" if operator == "symmetric_kl" else ""

    @cache
    def draw(n: int) -> list[Any]:
        return apart(inputs_of(operator, case, precision, draw=n))

    found = []
    try:
        for seed in seeds:
            simulator().set_seed(seed)
            found.append(check(operator, "cuda_sim", case, precision, draw, second))
    finally:
        simulator().set_seed(1)
    return found


# Those of the kernels as they are.
sound_results = cache(results)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.id)
def test_mutant(mutant: Mutant) -> None:
    """The case is right without the fault, and with it is caught, or has the same bits."""
    of_case = (mutant.operator, mutant.case, mutant.precision, mutant.seeds)
    sound = sound_results(*of_case)
    if mutant.caught == NOTHING:
        with planted(mutant):
            changed = results(*of_case)
        for before, after in zip(sound, changed):
            assert all(torch.equal(value, after[name]) for name, value in before.items())
        return
    with (
        planted(mutant),
        pytest.raises((RuntimeError, AssertionError), match=mutant.caught) as fault,
    ):
        results(*of_case)
    assert isinstance(fault.value, AssertionError) or f"kernel {mutant.kernel}, block" in str(
        fault.value
    )


def test_a_fault_names_the_line_of_the_kernel() -> None:
    """The load of another block's row that nothing orders, and the store of that row."""
    mutant = next(m for m in SYMMETRIC_KL if m.id == "symmetric_kl relaxed ticket")
    with planted(mutant), pytest.raises(RuntimeError) as fault:
        results(mutant.operator, mutant.case, mutant.precision, (1,))
    lines = re.findall(r"csrc/ops/symmetric_kl/fwd_sm80\.cu:\d+", str(fault.value))
    assert len(lines) == 2, fault.value
