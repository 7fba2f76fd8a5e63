"""Every operator on every backend, case and precision against the reference in float64, gradients
of all inputs included.

A backend that is asked for with ``--require-backend`` has to be able to run; a case that it refuses
by an honest sentence is skipped with that sentence, and `test_a_backend_serves_the_short_list`
keeps refusals rare.
"""

from __future__ import annotations

import pytest
import torch
from cases import case_of, cases_of
from parity import CELLS, PRECISIONS, check, run, why_refused, why_unavailable

from pelt_kernels.ops import _native as native
from pelt_kernels.ops._dispatch import backend_of

MATRIX = [
    pytest.param(
        operator,
        backend,
        case.id,
        precision,
        id=f"{operator}-{case.id}-{precision}-{backend}",
        marks=[pytest.mark.quick] if case.is_quick else [],
    )
    for operator in dict.fromkeys(operator for operator, _ in CELLS)
    for case in cases_of(operator)
    for precision in PRECISIONS
    for backend in (b for o, b in CELLS if o == operator)
]


@pytest.mark.parametrize(("operator", "backend", "case_id", "precision"), MATRIX)
def test_parity(operator, backend, case_id, precision, need, request):
    need(backend_of(backend), why_unavailable(operator, backend))
    case = case_of(operator, case_id)
    refusal = why_refused(operator, backend, case, precision)
    if refusal:
        pytest.skip(refusal)
    if backend_of(backend) != "cuda_sim":
        check(operator, backend, case, precision)
        return
    simulator = native.library("_C_sim")
    simulator.set_seed(1)
    first = check(operator, backend, case, precision)
    for seed in range(2, 1 + request.config.getoption("--simulator-seeds")):
        simulator.set_seed(seed)
        for name, value in run(operator, backend, case, precision).items():
            assert torch.equal(value, first[name]), (
                f"{name}: depends on the order of threads (seed {seed})"
            )


@pytest.mark.parametrize(
    ("operator", "backend"), dict.fromkeys((operator, backend_of(b)) for operator, b in CELLS)
)
def test_a_backend_serves_the_short_list(operator, backend, need):
    """The configurations that the methods use must be native in at least one precision, in one of a
    backend's forms.
    """
    need(backend, why_unavailable(operator, backend))
    refused = {
        case.id: why_refused(operator, backend, case, "bfloat16")
        for case in cases_of(operator)
        if case.is_quick
        and all(why_refused(operator, backend, case, precision) for precision in PRECISIONS)
    }
    assert not refused
