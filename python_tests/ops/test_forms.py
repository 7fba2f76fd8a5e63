"""Which form of a backend's kernels serves a call, where it has several."""

from __future__ import annotations

import pytest
import torch

from pelt_kernels.ops import (
    OPERATORS,
    BackendError,
    _dispatch,
    _forms,
    explain,
    forget_choices,
    gated_adapter,
)
from pelt_kernels.ops.gated_adapter.contract import CONTRACT


@pytest.fixture(autouse=True)
def _two_forms(monkeypatch):
    """The eager adapter with two forms, the second of which takes at most 64 rows."""
    eager = _dispatch.implementation("gated_adapter", "eager")
    monkeypatch.setattr(eager, "FORMS", ("usual", "other"), raising=False)

    def supports(call):
        return "it takes 64 rows" if call.form == "other" and call.sizes["S"] > 64 else ""

    monkeypatch.setattr(eager, "supports", supports)
    forget_choices()
    CONTRACT._calls.clear()
    yield
    forget_choices()
    CONTRACT._calls.clear()


def choice(backend="eager", rows=16):
    gated_adapter(torch.ones(rows, 16), torch.ones(4, 16), torch.ones(16, 4), backend=backend)
    return explain("gated_adapter")[-1]


def measured(monkeypatch, us, **sizes):
    row = {
        "op": "gated_adapter", "hardware": "the simulator", "dtype": "float32", "us": us,
        "sizes": {"B": 1, "S": 16, "D": 16, "R": 4} | sizes,
    }  # fmt: skip
    monkeypatch.setattr(_forms, "table", lambda: [row])


def test_without_measurements_the_usual_form_serves_and_says_so():
    assert choice().form == "usual" and "nothing near was measured" in choice().form_reason
    assert "-> eager:usual (as asked; usual is the usual form" in str(choice())


def test_what_was_measured_faster_nearby_goes_first(monkeypatch):
    measured(monkeypatch, {"usual": 9.0, "other": 3.0}, S=32)
    found = choice()
    assert found.form == "other"
    assert "by measurement at B=1 S=32 D=16 R=4: other 3 us, usual 9 us" in found.form_reason


def test_a_measurement_far_away_tells_nothing(monkeypatch):
    measured(monkeypatch, {"usual": 9.0, "other": 3.0}, S=4096)
    assert choice().form == "usual"


def test_the_fastest_form_that_is_able_serves(monkeypatch):
    measured(monkeypatch, {"usual": 9.0, "other": 3.0}, S=128)
    found = choice(rows=128)
    assert found.form == "usual" and found.refusals == {"eager:other": "it takes 64 rows"}


def test_a_form_can_be_asked_for():
    found = choice("eager:other")
    assert (found.backend, found.form, found.requested) == ("eager", "other", "eager:other")
    with pytest.raises(BackendError, match="'eager:other' was asked for but it takes 64 rows"):
        choice("eager:other", rows=128)
    sentence = "its forms of this operator are usual and other, not 'third'"
    with pytest.raises(BackendError, match=sentence):
        choice("eager:third")


def test_the_table_holds_rows_that_can_be_read():
    for row in _forms.table():
        assert {"op", "hardware", "dtype", "sizes", "us", "commit"} <= row.keys()
        assert row["op"] in OPERATORS and all(us > 0 for us in row["us"].values())
