"""PEFT as shipped and accelerated: what the benchmarks make of its tests' outcomes and of times."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from benchmarks import peft_step, peft_tables, step_models
from benchmarks.peers import peft_plugin, peft_tests
from benchmarks.rows import read, write
from benchmarks.timing import paired


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("tests/test_decoder_models.py::TestX::test_y[LoraConfig-config_kwargs1-gpt2]", True),
        ("tests/test_decoder_models.py::TestX::test_y[PrefixTuningConfig-config_kwargs1]", True),
        ("tests/test_custom_models.py::TestX::test_y[Vanilla MLP 1 LoRA-MLP]", True),
        ("tests/test_custom_models.py::TestMixedAdapterBatches::test_same", True),
        ("tests/test_lora_variants.py::TestX::test_y[AdaLoraConfig]", True),
        ("tests/test_mixed.py::TestX::test_y", True),
        *[
            (f"tests/test_decoder_models.py::TestX::test_y[{other}Config-config_kwargs1]", False)
            for other in ("AdaLora", "VBLoRA", "TinyLora", "RandLora", "XLora", "UniLora", "IA3")
        ],
    ],
)
def test_the_tests_that_count_are_those_of_lora_prefixes_and_mixed_batches(name, wanted):
    assert peft_plugin.is_wanted(name) is wanted


def test_outcomes_are_counted_by_test_and_what_differs_is_named(tmp_path):
    before = reports(a="passed", b="failed", c="skipped", d="passed", e="passed")
    after = reports(a="passed", b="failed", c="passed", d="failed")
    after += [
        {"test": "tests/test_x.py::a", "outcome": "failed", "reason": "taken down"},
        {"test": "tests/test_x.py::d", "outcome": "passed", "reason": ""},
        {"served": {"lora_linear": 1200}, "refused": {}, "backends": {"lora_linear": "cpu"}},
        {"commit": "0123456789abcdef"},
    ]
    found = {}
    for way, lines in (("before", before), ("after", after)):
        write(tmp_path / way, lines)
        found[way] = peft_tests.read_outcomes(tmp_path / way)
    row = json.loads(json.dumps(peft_tests.row_of("test_x", found)))
    assert row["before"] == {"passed": 3, "failed": 1, "skipped": 1}
    assert row["after"] == {"passed": 1, "failed": 3, "skipped": 0}
    assert list(peft_tests.differences([row])) == [
        "test_x.py::a: passed, accelerated failed: taken down",
        "test_x.py::c: skipped, accelerated passed: ",
        "test_x.py::d: passed, accelerated failed: because d",
        "test_x.py::e: passed, accelerated absent: ",
    ]
    assert row["failed_before"] == {"because b": 1}
    table = peft_tests.table([row, row | {"file": "test_z", "differ": []}])
    assert "| `test_x` | 3, 1, 1 | 1, 3, 0 | 4 |" in table
    assert "| all | 6, 2, 2 | 2, 6, 0 | 4 |" in table
    assert "2,400 by `lora_linear`" in table and "commit 0123456789." in table


def reports(**outcomes):
    return [
        {
            "test": f"tests/test_x.py::{test}",
            "outcome": outcome,
            "reason": "" if outcome == "passed" else f"because {test}",
        }
        for test, outcome in outcomes.items()
    ]


def test_a_phase_that_went_well_is_no_outcome_and_an_expected_failure_is_one(tmp_path):
    outcomes = peft_plugin.Outcomes(tmp_path / "outcomes")
    for when, outcome, more in (
        ("setup", "passed", {}),
        ("call", "passed", {}),
        ("teardown", "passed", {}),
        ("setup", "skipped", {"longrepr": ("file", 3, "Skipped: no GPU")}),
        ("call", "skipped", {"wasxfail": "known", "longrepr": "assert 1"}),
        (
            "call",
            "failed",
            {"longrepr": SimpleNamespace(reprcrash=SimpleNamespace(message="a\n b"))},
        ),
    ):
        report = {"nodeid": f"{when}-{outcome}", "longrepr": None, **more}
        outcomes.pytest_runtest_logreport(SimpleNamespace(when=when, outcome=outcome, **report))
    assert [(line["outcome"], line["reason"]) for line in read(tmp_path / "outcomes")] == [
        ("passed", ""),
        ("skipped", "Skipped: no GPU"),
        ("xfailed", "assert 1"),
        ("failed", "a b"),
    ]


def test_the_median_of_pairs_stands_with_its_spread():
    assert paired([1.0, 2.0, 3.0, 4.0, 10.0]) == {"median": 3.0, "low": 1.8, "high": 5.2}
    assert paired([2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_peft_has_prefixes_on_models_that_write_only():
    found = peft_step.configurations(["minilm", "llama"], ["lora-8", "prefix"], ["float32"])
    assert [str(each) for each in found] == [
        "minilm lora-8 float32",
        "llama lora-8 float32",
        "llama prefix float32",
    ]


def test_each_round_is_a_pair_and_a_slower_model_is_named():
    laps = {"peft": [(2.0, 4.0), (3.0, 4.0)], "accelerated": [(1.0, 8.0), (4.0, 8.0)]}
    figures = peft_step.compared(laps)
    assert figures["speedup"]["median"] == pytest.approx((2 + 0.75) / 2)
    assert figures["processor_speedup"]["median"] == 0.5
    assert (figures["rounds"], figures["seconds"], figures["peft_seconds"]) == (2, 2.5, 2.5)
    row = made("llama", "prefix", "float32", 0.96, 0.97)
    assert list(peft_step.slower(row)) == [
        "slower than PEFT: llama prefix float32, training: 0.96x"
    ]


def test_the_short_table_has_a_line_for_each_model_and_no_empty_column():
    rows = [
        made("minilm", "lora-8", "float32", 1.0, 1.5),
        made("minilm", "lora-64", "float32", 4.0, 1.5),
        made("llama", "lora-8", "float32", 1.1, 1.2),
        made("llama", "prefix", "float32", 1.3, 1.4),
    ]
    lines = peft_tables.headline(rows).splitlines()
    assert lines[0] == (
        "| model | LoRA, training step | LoRA, forward | prefix, training step | prefix, forward |"
    )
    assert lines[2] == (
        f"| {peft_tables.NAMES['minilm']} | **2.00x** (1.00–4.00) | **1.50x** | – | – |"
    )
    assert lines[3].endswith("| **1.10x** | **1.20x** | **1.30x** | **1.40x** |")
    assert (
        "4 texts of up to 128 tokens; peft 1; transformers 3; a processor, 2 thread(s)" in lines[-1]
    )
    full = peft_tables.full(rows).splitlines()
    assert full[5].startswith(
        f"| {peft_tables.NAMES['llama']} | prefix, 30 tokens | float32 | **1.30x"
    )
    assert full[5].endswith("| 0.50x | 0.1 |")
    rows.append(made("minilm", "lora-8", "float32", 1.7, 1.8, "Intel avx512"))
    assert peft_tables.headline(rows).startswith("\n".join(lines))
    assert "| **1.70x** | **1.80x** |" in peft_tables.headline(rows[-1:])
    assert peft_tables.full(rows) == peft_tables.full(rows[:-1]) + "\n" + peft_tables.full(
        rows[-1:]
    )
    assert set(peft_tables.NAMES) == set(step_models.MODELS)
    assert set(peft_tables.METHODS) == set(peft_step.METHODS)


def made(model, method, dtype, training, inference, kind="AMD avx2"):
    row = {"model": model, "method": method, "dtype": dtype, "peak_bytes": 1, "peft_peak_bytes": 2}
    for what, speedup in (("training", training), ("inference", inference)):
        figures = {"median": speedup, "low": speedup, "high": speedup}
        row[what] = {"speedup": figures, "peft_seconds": 0.1}
    versions = {"peft": "1", "torch": "2", "transformers": "3"}
    machine = {"cpu": "a processor", "kind": kind, "threads": 2}
    return row | {
        "batch": 4, "length": 128, "load": 0.1, "hardware": machine, "versions": versions,
        "commit": "0123456789abcdef",
    }  # fmt: skip
