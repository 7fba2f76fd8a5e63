"""What a backend refuses is what refusals.py declares, no more and no less."""

from __future__ import annotations

import pytest
from cases import cases_of
from parity import CELLS, PRECISIONS, cells, why_refused, why_unavailable
from refusals import REFUSALS, declared

from pelt_kernels.ops import BACKENDS
from pelt_kernels.ops._dispatch import backend_of


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_can_run_here(backend, need):
    """The tests of one that cannot are not there; where it is required, they fail."""
    reasons = (why_unavailable(*cell) for cell in CELLS if backend_of(cell[1]) == backend)
    need(backend, next(filter(None, reasons), ""))


@pytest.mark.parametrize(("operator", "request_"), cells())
def test_a_backend_refuses_what_is_declared(operator, request_, need):
    need(backend_of(request_), why_unavailable(operator, request_))
    for case in cases_of(operator):
        for precision in PRECISIONS:
            sentence = why_refused(operator, request_, case, precision)
            words = declared(operator, request_, case, precision)
            assert bool(sentence) == bool(words) and words in sentence, (case.id, precision)


def test_what_is_declared_is_there():
    """Operators, backends and cases by their names."""
    for operator, table in REFUSALS.items():
        names = {case.id for case in cases_of(operator)}
        for request, refusals in table.items():
            assert backend_of(request) in BACKENDS
            for refusal in refusals:
                assert set(refusal.cases.split()) <= names
                assert set(refusal.precisions.split()) <= set(PRECISIONS)
