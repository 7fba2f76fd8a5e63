"""Which form of a backend's kernels serves a call, where it has several, and where measurements say
that eager is faster.
"""

from __future__ import annotations

import json

import pytest
import torch

from pelt_kernels.ops import (
    BACKENDS,
    OPERATORS,
    BackendError,
    _dispatch,
    _forms,
    explain,
    forget_choices,
    gated_adapter,
)
from pelt_kernels.ops import _native as native
from pelt_kernels.ops.gated_adapter.contract import CONTRACT

HERE = _forms.hardware(torch.device("cpu"))


@pytest.fixture(autouse=True)
def _fresh():
    forget_choices()
    CONTRACT._signatures.clear()
    yield
    forget_choices()
    CONTRACT._signatures.clear()


@pytest.fixture(autouse=True)
def _two_forms(monkeypatch):
    """The CPU's adapter with eager's arithmetic and two forms, the second of which takes at most 64
    rows: these tests need no compiled module.
    """
    cpu = _dispatch.implementation("gated_adapter", "cpu")
    eager = _dispatch.implementation("gated_adapter", "eager")

    def supports(signature, backend, form, needs_grad):
        if not backend.startswith("cpu"):
            return "it is not under test"
        return "it takes 64 rows" if form == "other" and signature.sizes["S"] > 64 else ""

    why_not = native.why_not
    monkeypatch.setattr(native, "why_not", lambda name: "" if name == "_C" else why_not(name))
    monkeypatch.setattr(cpu, "FORMS", {"cpu": ("usual", "other")})
    for name in ("forward", "backward"):
        monkeypatch.setattr(cpu, name, getattr(eager, name))
    monkeypatch.setattr(cpu, "supports", supports)
    monkeypatch.setattr(cpu, "plan", lambda chosen: None)


def choice(backend=None, rows=16, needs_grad=False):
    x = torch.ones(rows, 16, requires_grad=needs_grad)
    gated_adapter(x, torch.ones(4, 16), torch.ones(16, 4), backend=backend)
    return explain("gated_adapter")[-1]


@pytest.fixture
def measured(monkeypatch):
    """measured(us, S=...): the table is this row."""

    def measured(us, direction="forward", **sizes):
        row = {
            "op": "gated_adapter", "hardware": HERE, "dtype": "float32", "direction": direction,
            "us": us, "sizes": {"B": 1, "S": 16, "D": 16, "R": 4} | sizes, "options": [],
        }  # fmt: skip
        key = tuple(row[name] for name in ("op", "hardware", "dtype", "direction"))
        monkeypatch.setattr(_forms, "table", lambda: {key: [row]})

    return measured


def test_without_measurements_the_usual_form_serves_and_says_so(measured):
    measured({})
    assert choice().form == "usual"
    assert (
        f"-> cpu:usual (automatic; usual is the usual form; nothing near was measured on {HERE}; cuda: "
        in str(choice())
    )


def test_what_was_measured_faster_nearby_goes_first(measured):
    measured({"cpu:usual": 9.0, "cpu:other": 3.0, "eager": 20.0}, S=32)
    found = choice()
    assert found.form == "other"
    assert found.form_reason == (
        "by measurement of forward at B=1 S=32 D=16 R=4: cpu:other 3 us, cpu:usual 9 us, eager 20 us"
    )


def test_a_measurement_far_away_tells_nothing(measured):
    measured({"cpu:usual": 9.0, "cpu:other": 3.0, "eager": 1.0}, S=4096)
    assert choice().served == "cpu:usual"


def test_the_fastest_form_that_is_able_serves(measured):
    measured({"cpu:usual": 9.0, "cpu:other": 3.0, "eager": 9.2}, S=128)
    found = choice(rows=128)
    assert found.form == "usual" and found.refusals["cpu:other"] == "it takes 64 rows"


def test_a_form_can_be_asked_for():
    found = choice("cpu:other")
    assert (found.backend, found.form, found.requested) == ("cpu", "other", "cpu:other")
    with pytest.raises(BackendError, match="'cpu:other' was asked for but it takes 64 rows"):
        choice("cpu:other", rows=128)
    sentence = (
        r"'cpu:third' was asked for but it expects one of the instruction sets that it has kernels"
        r" for and this processor runs \(usual, other\), not 'third'\.  Able: cpu, (cpu_sim, )?eager"
    )
    with pytest.raises(BackendError, match=sentence):
        choice("cpu:third")


def test_where_eager_was_measured_faster_no_kernel_serves_by_itself(measured):
    measured({"cpu:usual": 1040.0, "cpu:other": 1100.0, "eager": 820.0})
    found = choice()
    assert found.served == "eager"
    assert found.refusals["cpu"] == (
        "eager took 820 us and cpu:usual 1040 us for forward at B=1 S=16 D=16 R=4,"
        f" measured on {HERE}"
    )
    assert "-> eager (automatic; " in str(found) and "; cpu: eager took 820 us" in str(found)
    assert choice("cpu").served == "cpu:usual"
    assert choice("cpu:other").served == "cpu:other"


@pytest.mark.parametrize(("us", "served"), [(102.9, "cpu:usual"), (103.1, "eager")])
def test_what_two_runs_differ_by_decides_nothing(us, served, measured):
    measured({"cpu:usual": us, "eager": 100.0})
    assert choice().served == served


def test_a_faster_form_that_is_not_able_does_not_speak_for_another(measured):
    measured({"cpu:usual": 9.0, "cpu:other": 3.0, "eager": 5.0}, S=128)
    assert choice(rows=128).served == "eager"
    measured({"cpu:other": 3.0, "eager": 2.0}, S=128)
    CONTRACT._signatures.clear()
    assert choice(rows=128).served == "cpu:usual", "it was not measured"


def test_each_direction_goes_by_its_own_measurements(measured):
    measured({"cpu:usual": 9.0, "eager": 1.0}, "forward")
    with torch.no_grad():
        assert choice(needs_grad=True).served == "eager"
    assert choice(needs_grad=True).served == "cpu:usual"
    assert choice(rows=17).served == "eager"


def test_a_call_goes_by_the_measurement_with_options_like_its_own(monkeypatch):
    key = ("gated_adapter", HERE, "float32", "forward")
    sizes = {"B": 1, "S": 16, "D": 16, "R": 4}
    plain = {"sizes": sizes, "options": [], "us": {"cpu:usual": 3.0, "cpu:other": 9.0}}
    norm = {"sizes": sizes, "options": ["dropout", "activation=gelu"], "us": {"cpu:other": 1.0}}
    rows = [{"direction": "forward", **row} for row in (plain, norm)]
    monkeypatch.setattr(_forms, "table", lambda: {key: rows})
    x, down, up = torch.ones(16, 16), torch.ones(4, 16), torch.ones(16, 4)
    for options, form in (
        ({}, "usual"),
        ({"activation": "gelu"}, "usual"),
        ({"activation": "gelu", "dropout_p": 0.1}, "other"),
    ):
        gated_adapter(x, down, up, **options)
        assert explain("gated_adapter")[-1].form == form


def test_options_far_apart_tell_nothing(measured, monkeypatch):
    measured({"cpu:usual": 9.0, "cpu:other": 3.0})
    monkeypatch.setattr(_forms, "options", lambda call: [str(i) for i in range(13)])
    assert choice().form == "usual"


def test_what_was_chosen_is_told_again_after_forgetting(measured):
    measured({"cpu:usual": 9.0, "eager": 1.0})
    before = [choice(rows=16), choice(rows=17)]
    forget_choices()
    assert [choice(rows=16), choice(rows=17)] == before == explain("gated_adapter")


def test_the_table_holds_rows_that_can_be_read():
    rows = [json.loads(line) for line in _forms.FILE.read_text().splitlines()]
    for row in rows:
        keys = {"op", "hardware", "dtype", "direction", "sizes", "options", "us", "commit"}
        assert keys <= row.keys()
        assert row["op"] in OPERATORS and all(us > 0 for us in row["us"].values())
        assert row["direction"] in _forms.DIRECTIONS.values()
        assert {_dispatch.backend_of(request) for request in row["us"]} <= set(BACKENDS)
    assert sum(map(len, _forms.table().values())) == len(rows)


@pytest.mark.parametrize(
    ("dtype", "multiplies", "rows", "served"),
    [
        (torch.bfloat16, True, {}, "eager"),
        (torch.bfloat16, False, {}, "cpu:usual"),
        (torch.float32, True, {}, "cpu:usual"),
        # Far from these sizes, but on this kind of processor.
        (torch.bfloat16, True, {("gated_adapter", HERE, "bfloat16", "forward"): []}, "cpu:usual"),
    ],
)
def test_where_torch_multiplies_bfloat16_the_kernels_wait_for_a_measurement(
    dtype, multiplies, rows, served, monkeypatch
):
    monkeypatch.setattr(native, "has_bf16_products", lambda: multiplies)
    monkeypatch.setattr(_forms, "table", lambda: rows)
    x, w = torch.ones(16, 16, dtype=dtype), torch.ones(4, 16, dtype=dtype)
    gated_adapter(x, w, w.T.contiguous())
    found = explain("gated_adapter")[-1]
    assert found.served == served
    assert found.refusals.get("cpu", "").startswith("nobody has measured") == (served == "eager")
    gated_adapter(x, w, w.T.contiguous(), backend="cpu")
    assert explain("gated_adapter")[-1].served == "cpu:usual"
