"""`benchmarks.run`: what it refuses, and that only what is right gets a speed."""

from __future__ import annotations

import pytest
import torch

from benchmarks import contenders, forms, roofline, run, shapes, timing
from benchmarks.rows import read
from pelt_kernels.ops import OPERATORS
from pelt_kernels.ops import _native as native
from pelt_kernels.ops._dispatch import backend_of, contract_of

ONE = ["--op", "symmetric_kl", "--device", "cpu", "--cases", "T512-C2-tokens", "--dtypes",
       "float32", "--no-compile", "--seconds", "0.001"]  # fmt: skip
KEYS = {
    "op", "case", "dtype", "direction", "backend", "baseline", "us", "baseline_us", "speedup",
    "spread", "bytes", "gbps", "limit_us", "is_default", "peak_bytes", "hardware", "kind", "torch",
    "commit",
}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--op", "adapter"], "--op: expected some of gated_adapter"),
        (["--device", "tpu"], "--device: expected cpu or cuda, got 'tpu'"),
        (["--cases", "T1"], "--cases: expected quick, full or some of symmetric_kl's T512"),
        (["--backends", "cpu,fast"], "--backends: backend: expected one of cuda"),
        (["--dtypes", "int8"], "--dtypes: expected some of float32"),
        (["--json", "/nowhere/rows.jsonl"], "--json: expected a folder that can be written to"),
        (["--plot", "/nowhere"], "--plot: expected a folder that can be written to"),
    ],
)
def test_a_wrong_request_is_one_sentence(more, sentence, capsys):
    assert run.main([*ONE, *more]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_a_gpu_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main([*ONE, "--device", "cuda"]) == 2
    assert "expected a CUDA GPU" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def quick_limits(monkeypatch):
    """What the machine allows is not what these tests are about."""
    monkeypatch.setitem(roofline.WORKING_SETS, "cpu", (1 << 16,))
    monkeypatch.setitem(roofline.PRODUCTS, "cpu", (64,))
    monkeypatch.setattr(roofline, "SECONDS", 1e-3)
    monkeypatch.setattr(roofline, "_bytes", {})
    monkeypatch.setattr(roofline, "_products", {})


@pytest.fixture
def compiled(need):
    need("cpu", native.why_not("_C"))


def test_rows(compiled, tmp_path):
    file = tmp_path / "rows.jsonl"
    assert run.main([*ONE, "--json", str(file)]) == 0
    rows = read(file)
    assert {row["direction"] for row in rows} == {"forward", "forward+backward"}
    assert all(row.keys() >= KEYS for row in rows)
    assert {row["baseline"] for row in rows} == {"reference", "plain"}
    assert all(row["us"] > 0 for row in rows)


def test_rows_of_requests_side_by_side(compiled, tmp_path):
    assert run.main([*ONE, "--backends", "cpu,eager", "--json", str(tmp_path)]) == 0
    (file,) = tmp_path.iterdir()
    assert file == run.file_in(tmp_path, "cpu") and file.name.startswith("operators_cpu_")
    rows = read(file)
    pairs = {(row["backend"], row["baseline"], row["is_default"]) for row in rows}
    assert {("cpu", "eager", True), ("eager", "plain", False), ("eager", "cpu", False)} <= pairs
    us = {(row["direction"], row["backend"]): row["us"] for row in rows}
    for row in rows:
        if row["baseline"] == "cpu":
            assert row["baseline_us"] == us[row["direction"], "cpu"]


def test_what_the_dispatch_chooses_is_always_measured(compiled, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "default_of", lambda *_: "eager")
    file = tmp_path / "rows.jsonl"
    assert run.main([*ONE, "--json", str(file)]) == 0
    rows = read(file)
    assert {(backend_of(row["backend"]), row["is_default"]) for row in rows} == {
        ("cpu", False),
        ("eager", True),
    }


def test_what_is_not_close_gets_no_speed(compiled, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise AssertionError("loss: error 1, allowed 0")

    monkeypatch.setattr(contenders.parity, "check", refuse)
    file = tmp_path / "rows.jsonl"
    assert run.main([*ONE, "--json", str(file)]) == 1
    assert read(file) == []
    error = capsys.readouterr().err
    assert "symmetric_kl T512-C2-tokens float32 cpu:" in error and ": loss: error 1" in error


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_has_cases(operator):
    for device in ("cpu", "cuda"):
        cases = shapes.cases_of(operator, device)
        assert any(case.is_quick for case in cases)
        assert len({case.id for case in cases}) == len(cases)


def test_peak_memory_counts_what_lives_at_once():
    def call():
        a = torch.empty(1000, dtype=torch.uint8)
        b = torch.empty(500, dtype=torch.uint8)
        del a
        torch.empty(200, dtype=torch.uint8)
        return b

    assert 1500 <= timing.peak_bytes(call, "cpu") < 1700


def test_rows_without_forms_change_no_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(forms, "FILE", tmp_path / "forms.jsonl")
    file = tmp_path / "rows.jsonl"
    file.write_text("")
    assert forms.main([str(file)]) == 2
    assert "expected rows of backends with forms" in capsys.readouterr().err


def test_no_value_lies_so_near_the_kink_that_rounding_takes_the_other_side():
    operator = "gated_adapter"
    names = contract_of(operator).CONTRACT.input_names
    for case in [*shapes.cases_of(operator, "cpu"), *shapes.swept(operator)]:
        if "bank w_down" in case.inputs or "pre_norm_weight" in case.inputs:
            continue
        values = contenders.parity.inputs_of(operator, case, "float32")
        x, w, b = (dict(zip(names, values))[name].double() for name in ("x", "w_down", "b_down"))
        assert torch.nn.functional.linear(x, w, b).abs().min() > 1.5e-6, case.id
