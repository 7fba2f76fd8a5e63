"""Sizes of 0: an empty result, the limit of the formula, or one sentence; on every backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import cases_of
from parity import OPERATORS, cells, check, contract_of, run, why_refused, why_unavailable

from pelt_kernels.ops import LoraBranch, gated_adapter, lora_linear

QUICK = {operator: [case for case in cases_of(operator) if case.is_quick] for operator in OPERATORS}


def with_zero(case, letter):
    """The case with one size 0, and as many entries to keep as there are then."""
    size = case.sizes[letter]
    empty = tuple(None if s is None else 0 for s in size) if isinstance(size, tuple) else 0
    sizes = {**case.sizes, letter: empty}
    attributes = dict(case.attributes)
    if "keep" in attributes:
        attributes["keep"] = min(attributes["keep"], sizes["Dout"] * sizes["Din"])
    return replace(case, id=f"{case.id}, {letter} = 0", sizes=sizes, attributes=attributes)


@pytest.mark.parametrize(("operator", "backend"), cells())
def test_a_size_of_0_is_served_right_or_refused_in_one_sentence(operator, backend, need):
    need(backend, why_unavailable(operator, backend))
    precision = "bfloat16" if backend.startswith("cuda") else "float32"
    contract, served = contract_of(operator).CONTRACT, 0
    for case in QUICK[operator]:
        for letter in case.sizes:
            if letter in ("M", "M_up", "M_i", "N_i", "A_i"):
                continue  # banks: no index can be drawn
            empty = with_zero(case, letter)
            if letter in contract.never_zero.split():
                with pytest.raises(
                    ValueError, match=f"^{operator}: expected a size {letter} of at least 1, got 0"
                ):
                    run(operator, backend, empty, precision)
                continue
            try:
                refusal = why_refused(operator, backend, empty, precision)
            except ValueError as error:
                assert str(error).startswith(f"{operator}: expected ")
                continue
            if not refusal:
                check(operator, backend, empty, precision)
                served += 1
    assert served


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("shape", [(0, 3, 4, 16), (3, 0, 4, 16), (0, 4, 16), (0, 16), (0, 0, 16)])
def test_an_empty_batch_of_any_rank(shape, backend, need):
    need(backend, why_unavailable("lora_linear", backend))
    x = torch.randn(shape, requires_grad=True)
    a, b = torch.randn(4, 16, requires_grad=True), torch.randn(12, 4, requires_grad=True)
    y = lora_linear(x, torch.randn(12, 16), None, [LoraBranch(a, b)], backend=backend)
    assert y.shape == (*shape[:-1], 12)
    y.sum().backward()
    assert x.grad.shape == shape and not a.grad.any() and not b.grad.any()


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_a_bank_without_members(backend, need):
    need(backend, why_unavailable("gated_adapter", backend))
    x, none = torch.randn(2, 5, 8), torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expected a size M of at least 1, got 0 \(from w_down\)"):
        gated_adapter(x, torch.randn(0, 4, 8), torch.randn(8, 4), backend=backend)
    branch = LoraBranch(torch.randn(4, 8), torch.randn(0, 6, 4))
    with pytest.raises(ValueError, match=r"expected a size N_i of at least 1, got 0 \(from b\[0\]"):
        lora_linear(x, torch.randn(6, 8), None, [branch], backend=backend)
    y = gated_adapter(
        x[:0], torch.randn(3, 4, 8), torch.randn(8, 4), bank_index=none, backend=backend
    )
    assert y.shape == (0, 5, 8)
