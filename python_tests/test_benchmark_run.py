"""`benchmarks.run`: what it refuses, and that only what is right gets a speed."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import contenders, forms, run, shapes, timing
from pelt_kernels.ops import OPERATORS
from pelt_kernels.ops import _native as native
from pelt_kernels.ops._cases import make_attributes
from pelt_kernels.ops._dispatch import contract_of

ONE = ["--op", "symmetric_kl", "--device", "cpu", "--cases", "T512-C2-tokens", "--dtypes",
       "float32", "--no-compile", "--seconds", "0.001"]  # fmt: skip
KEYS = {
    "op", "case", "dtype", "direction", "backend", "baseline", "us", "baseline_us", "speedup",
    "spread", "bytes", "gbps", "peak_bytes", "hardware", "torch", "commit",
}  # fmt: skip


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--op", "adapter"], "--op: expected some of gated_adapter"),
        (["--device", "tpu"], "--device: expected cpu or cuda, got 'tpu'"),
        (["--cases", "T1"], "--cases: expected quick, full or some of symmetric_kl's T512"),
        (["--dtypes", "int8"], "--dtypes: expected some of float32"),
        (["--json", "/nowhere/rows.json"], "--json: expected a folder that can be written to"),
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


@pytest.fixture
def compiled(need):
    need("cpu", native.why_not("_C"))


def test_rows(compiled, tmp_path):
    file = tmp_path / "rows.json"
    assert run.main([*ONE, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert {row["direction"] for row in rows} == {"forward", "forward+backward"}
    assert all(row.keys() >= KEYS for row in rows)
    assert all(row["us"] > 0 and row["baseline"] == "reference" for row in rows)


def test_what_is_not_close_gets_no_speed(compiled, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise AssertionError("loss: error 1, allowed 0")

    monkeypatch.setattr(contenders.parity, "check", refuse)
    file = tmp_path / "rows.json"
    assert run.main([*ONE, "--json", str(file)]) == 1
    assert json.loads(file.read_text()) == []
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
    monkeypatch.setattr(forms, "FILE", tmp_path / "forms.json")
    file = tmp_path / "rows.json"
    file.write_text("[]")
    assert forms.main([str(file)]) == 2
    assert "expected rows of backends with forms" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("operator", "case_id"),
    [("lora_linear", "lora"), ("lora_linear", "unipelt"), ("prefix_attention", "unipelt"),
     ("prefix_attention", "causal"), ("prefix_attention", "t5")],
)  # fmt: skip
def test_peers_compute_what_the_reference_computes(operator, case_id):
    case, module = contenders.parity.case_of(operator, case_id), contract_of(operator)
    values = contenders.parity.inputs_of(operator, case, "float32")
    named = dict(zip(module.CONTRACT.attribute_names, make_attributes(module.CONTRACT, case)))
    named["seed"] = 0
    wanted = module.reference(*values, **named)[0]
    peers = contenders.peers_of(operator, case)
    assert peers
    for name, peer in peers.items():
        if name != "frozen linear":
            torch.testing.assert_close(peer(*values, **named)[0], wanted)
