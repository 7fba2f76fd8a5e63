"""`benchmarks.forms`: what of a run's rows enters the table by which the dispatch chooses."""

from __future__ import annotations

import pytest

from benchmarks import forms
from benchmarks.rows import read, write
from pelt_kernels.ops import _dispatch as dispatch

OF_UNIPELT = ["bias", "gate_weight", "gate_bias", "mask", "poolings=masked_mean"]
THIS = "Intel amx"


def row(
    backend, us, direction="forward+backward", baseline="reference", kind="a GPU",
    case="T1024-D768-R8-lora", dtype="bfloat16",
):  # fmt: skip
    return {"op": "lora_linear", "case": case, "kind": kind, "dtype": dtype,
            "direction": direction, "backend": backend, "us": us, "commit": "c",
            "baseline": baseline, "baseline_us": 7.0, "sizes": {"S": 128, "R_i": [8]}}  # fmt: skip


@pytest.fixture
def table(tmp_path, monkeypatch):
    """table(rows): what is in the table after these rows were taken into it."""
    monkeypatch.setattr(forms, "FILE", tmp_path / "forms.jsonl")
    forms.FILE.write_text("")

    def table(rows, code=0):
        file = tmp_path / "rows.jsonl"
        write(file, list(rows))
        assert forms.main([str(file)]) == code
        return read(forms.FILE)

    return table


def test_forms_of_a_gpu_by_direction(table):
    measured = [row("cuda:single", 5), row("cuda:composed", 4), row("triton", 9)]
    forward = [row("cuda:single", 3, "forward"), row("cuda:composed", 2.004, "forward")]
    assert table([*measured, *forward]) == [
        {"op": "lora_linear", "hardware": "a GPU", "dtype": "bfloat16", "direction": direction,
         "sizes": {"S": 128, "R_i": [8]}, "us": us, "commit": "c", "options": ["bias"]}
        for direction, us in (
            ("forward", {"cuda:single": 3, "cuda:composed": 2.0}),
            ("forward+backward", {"cuda:single": 5, "cuda:composed": 4, "triton": 9}),
        )
    ]  # fmt: skip


def test_new_rows_take_the_place_of_old_ones_for_the_same_thing(table):
    table([row("cuda:single", 1), row("cuda:composed", 2)])
    table([row("cuda:single", 1, kind="b GPU"), row("cuda:composed", 2, kind="b GPU")])
    found = table([row("cuda:single", 5), row("cuda:composed", 4)])
    assert [(row["hardware"], row["us"]["cuda:single"]) for row in found] == [
        ("a GPU", 5),
        ("b GPU", 1),
    ]


def test_cases_of_the_same_sizes_are_told_apart_by_their_options(table):
    found = table(
        row(f"cuda:{form}", us, case=f"T1024-D768-R8{like}")
        for like in ("-lora", "-dropout", "")
        for form, us in (("single", 5), ("composed", 4))
    )
    assert sorted(row["options"] for row in found) == sorted(
        [["bias"], ["bias", "gate", "dropout"], OF_UNIPELT]
    )


def test_master_parameters_are_an_option_beside_the_dtype_of_activations(table):
    (found,) = table(row(f"cuda:{f}", 1, dtype="bfloat16-master") for f in ("single", "composed"))
    assert (found["dtype"], found["options"]) == ("bfloat16", ["bias", "master"])


def test_a_case_that_is_gone_is_named(table, capsys):
    assert table([row("cuda:single", 1, case="T1", baseline="eager")], 2) == []
    assert "cases of benchmarks/shapes.py, got lora_linear's T1" in capsys.readouterr().err


@pytest.mark.parametrize("is_backend", [True, False])
def test_a_cpu_goes_by_its_kind_and_eager_beside_its_best_form(is_backend, table):
    """Eager may stand in a run's rows as a backend of its own or as what another is compared with."""
    if is_backend:
        rows = [row("cpu:avx2", 5, kind=THIS), row("eager", 7, kind=THIS)]
    else:
        rows = [row("cpu:avx2", 5, kind=THIS, baseline=peer) for peer in ("plain", "eager")]
    (found,) = table(rows)
    assert found["hardware"] == THIS
    assert found["us"] == {"cpu:avx2": 5, "eager": 7}


def test_what_is_no_way_to_serve_a_call_stays_out(table, monkeypatch):
    monkeypatch.setattr(dispatch, "forms_of", lambda operator, backend: ("avx2", "baseline"))
    names = ("plain", "torch.compile", "PEFT", "cuda_sim:single", "cpu", "cpu:avx2", "eager")
    (found,) = table([row(name, 5, kind=THIS) for name in names])
    assert set(found["us"]) == {"cpu:avx2", "eager"}
    assert table([row("cpu", 5, baseline="eager", kind=THIS)], 2) == [found]
