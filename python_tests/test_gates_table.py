"""The tables of what gates do: runs with and without them, reported, in rows and pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_encoder import tiny_model, toy_files

from benchmarks import gates, gates_table, readme, training_runs
from benchmarks.rows import Rows, read
from pelt_kernels.training.gate_report.ablation import ALL, OWN_MEAN, PARTS, REMOVED, UNGATED

__all__ = ["tiny_model", "toy_files"]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of rows whose page nobody writes."""
    monkeypatch.setattr(gates_table, "RESULTS", tmp_path / "gates.jsonl")
    monkeypatch.setattr(readme, "main", lambda: None)
    return tmp_path / "gates.jsonl"


def briefly(*words: str) -> int:
    """A command in this process, its training a few steps."""
    from pelt_kernels.cli import main

    return main([*words, "--epochs", "2"] if words[0] == "train" else list(words))


def test_runs_are_trained_and_reported_once(
    tiny_model: Path,
    toy_files: tuple[Path, Path],
    tmp_path: Path,
    results: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task = toy_files[0].parent
    command = ["--data", str(task.parent), "--tasks", task.name, "--model", str(tiny_model)]
    command += ["--seeds", "0", "--train-examples", "48", "--runs", str(tmp_path / "runs")]
    monkeypatch.setattr(training_runs, "command", briefly)
    # The run with gates is there first, so its report has to be made anew beside the other.
    assert gates.main([*command, "--variants", "unipelt"]) == 0
    (row,) = read(results)
    assert UNGATED not in {change["change"] for change in row["changes"]}
    assert gates.main(command) == 0
    (row,) = read(results)
    assert (row["variant"], row["seed"], row["train_examples"]) == ("unipelt", 0, 48)
    changes = {(change["of"], change["change"]) for change in row["changes"]}
    assert changes >= {
        (ALL, OWN_MEAN),
        (ALL, UNGATED),
        *((part, REMOVED) for part in PARTS),
    }
    assert f"| {task.name} | `unipelt` | 0 | 0." in gates_table.followed([row])
    before = results.read_text()
    monkeypatch.setattr(training_runs, "command", lambda *words: pytest.fail(f"again: {words}"))
    assert gates.main(command) == 0 and results.read_text() == before


def test_a_variant_is_the_method_with_its_fields() -> None:
    assert gates.method_of("unipelt") == ["--method", "unipelt"]
    assert gates.method_of("ungated").count("--set") == len(PARTS)
    assert "gate_penalty=0.01" in gates.method_of("l1-0.01")
    for unknown in ("l2-0.01", "l1", "lora"):
        with pytest.raises(SystemExit, match="expected a variant"):
            gates.method_of(unknown)


def test_a_folder_without_the_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"expected train.tsv, and dev.tsv or test.tsv, in "):
        gates.files(tmp_path)


def rows_of(*differences: tuple[float, bool]) -> Rows:
    return [
        {
            "task": "toy", "variant": "unipelt", "seed": seed, "score": 0.75 + 0.01 * seed,
            "train_examples": 500, "test_examples": 60, "commit": "0" * 40,
            "hardware": {"cpu": "x", "threads": 1}, "versions": {"torch": "2"},
            "changes": [of_change(ALL, OWN_MEAN, *difference)],
        }
        for seed, difference in enumerate(differences)
    ]  # fmt: skip


def of_change(of: str, change: str, value: float, is_effect: bool) -> dict[str, Any]:
    return {"of": of, "change": change, "difference": {"value": value, "is_effect": is_effect}}


def test_a_change_stands_with_its_range_and_the_seeds_that_show_it() -> None:
    table = gates_table.worth(rows_of((-0.02, True), (0.01, False)))
    assert "| as trained | 75.5 (75.0 to 76.0) |" in table
    assert "| every gate held at its own mean | −0.5 (−2.0 to +1.0, shown in 1 of 2) |" in table
    assert "| trained without gates | – |" in table
    assert "| | toy, 2 seeds |" in table
    assert "\n500 training and 60 test examples (toy); x, 1 thread(s); " in table


def test_runs_with_a_penalty_are_not_in_the_table_of_worth() -> None:
    rows = rows_of((0.0, False), (0.0, False))
    rows[1]["variant"] = "l1-0.01"
    table = gates_table.worth(rows)
    assert "| | toy, one seed |" in table and "| as trained | 75.0 |" in table
    assert "| every gate held at its own mean | 0.0 |" in table
