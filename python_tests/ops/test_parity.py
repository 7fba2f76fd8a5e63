"""Every operator on every backend, case and precision against the reference in float64, gradients
of all inputs included.

A cell of the matrix is there where the backend can run here and does not refuse the case
(refusals.py); what --require-backend names is there in any case, and fails where it cannot run.
Triton's interpreter, which is slow and rounds as PyTorch does, runs cases off the short list in
float32 and in one precision of 16 bits, another from case to case.
"""

from __future__ import annotations

import pytest
from cases import case_of, cases_of
from parity import (
    OPERATORS,
    PRECISIONS,
    QUICK,
    cells,
    check,
    check_in_every_order,
    device_of,
    serves,
    why_unavailable,
)

from pelt_kernels.ops._dispatch import backend_of

WIDE, *NARROW = PRECISIONS


def precisions(backend, case, number):
    """Those in which a backend runs the case, the number-th of its operator."""
    if case.is_quick or backend != "triton" or device_of(backend) != "cpu":
        return PRECISIONS
    return WIDE, NARROW[number % len(NARROW)]


MATRIX = [
    pytest.param(
        operator,
        backend,
        case.id,
        precision,
        id=f"{operator}-{case.id}-{precision}-{backend}",
        marks=[pytest.mark.quick] if case.is_quick else [],
    )
    for operator in OPERATORS
    for number, case in enumerate(cases_of(operator))
    for _, backend in cells(operator)
    for precision in precisions(backend, case, number)
    if serves(operator, backend, case, precision)
]


@pytest.mark.parametrize(("operator", "backend", "case_id", "precision"), MATRIX)
def test_parity(operator, backend, case_id, precision, need, request):
    need(backend_of(backend), why_unavailable(operator, backend))
    case = case_of(operator, case_id)
    if backend_of(backend) != "cuda_sim":
        check(operator, backend, case, precision)
        return
    seeds = range(1, 1 + request.config.getoption("--simulator-seeds"))
    check_in_every_order(operator, backend, case, precision, seeds=seeds)


@pytest.mark.parametrize(
    ("operator", "backend"), dict.fromkeys((o, backend_of(request)) for o, request in cells())
)
def test_a_backend_serves_the_short_list(operator, backend, need):
    """The configurations that the methods use must be native in at least one precision, in one of a
    backend's forms.
    """
    need(backend, why_unavailable(operator, backend))
    forms = [request for _, request in cells(operator) if backend_of(request) == backend]
    for quick in (case_of(operator, name) for o, name in QUICK if o == operator):
        assert any(serves(operator, form, quick, p) for form in forms for p in PRECISIONS), quick.id
