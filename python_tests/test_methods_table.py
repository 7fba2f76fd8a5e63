"""The table of methods on files of one's own: trained, resumed, written into a page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tiny_encoder import tiny_model, toy_files

from benchmarks import methods_table, readme
from benchmarks.rows import read, write

__all__ = ["tiny_model", "toy_files"]


def test_rows_are_trained_once_and_stand_beside_each_other(
    tiny_model: Path,
    toy_files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page = tmp_path / "README.md"
    page.write_text("<!-- tasks table: begin -->\n<!-- tasks table: end -->\n")
    monkeypatch.setattr(readme, "METHODS", tmp_path / "results" / "methods.jsonl")
    monkeypatch.setattr(readme, "tables", lambda: {page: only_tasks()})
    monkeypatch.setattr(readme, "draw_pictures", lambda folder: None)
    common = ["--task", str(toy_files[0]), "--eval", str(toy_files[1]), "--model", str(tiny_model)]
    common += ["--train-examples", "48", "--seeds", "0", "--name", "toy", "--metric", "f1"]
    common += ["--runs", str(tmp_path / "runs"), "--methods", "bitfit,adamix-lora"]
    assert methods_table.main(common) == 0
    first = page.read_text()
    assert "| method | toy, F1 | trained parameters | stored |" in first
    assert "| `bitfit` | 0." in first and "| `adamix-lora` | 0." in first
    assert "With one random expert for each module (mean of 5 draws), " in first
    assert "`adamix-lora` on toy 0." in first.replace("\n", " ")
    rows = read(tmp_path / "results" / "methods_toy.jsonl")
    assert [row["row"] for row in rows] == ["bitfit", "adamix-lora"]
    assert len(rows[1]["random_experts"]) == methods_table.RANDOM_EXPERTS
    for row in ("bitfit", "adamix-lora"):
        (tmp_path / "runs" / row / "run.json").unlink()  # a second training would miss it
    assert methods_table.main(common) == 0 and page.read_text() == first
    (tmp_path / "runs" / "bitfit" / "commit").unlink()  # as where the folder of old runs is gone
    methods_table._write(tmp_path / "runs", methods_table.ON_FILES, "toy")
    assert page.read_text() == first
    rows[0]["train_examples"] = 500
    write(tmp_path / "results" / "methods_toy.jsonl", rows)
    methods_table._write(tmp_path / "runs", methods_table.ON_FILES, "toy")
    assert [r["row"] for r in read(tmp_path / "results" / "methods_toy.jsonl")] == ["adamix-lora"]


def only_tasks() -> dict[str, str]:
    """The tables of a page that has no other."""
    return {"tasks table": readme.tasks_table({"toy": read(readme.task_file("toy"))})}


def test_without_the_data_it_is_skipped_with_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert methods_table.main(["--task", str(tmp_path / "no" / "train.tsv")]) == 0
    assert "skipped, " in capsys.readouterr().err


def row_of(
    name: str, mean: float, metric: str = "accuracy", notes: Sequence[str] = ()
) -> dict[str, Any]:
    return {
        "row": name, "metric": metric, metric: {"mean": mean, "std": 0.01}, "commit": "0" * 40,
        "trainable_parameters": 7, "random_experts": [], "train_examples": 200,
        "test_examples": 10, "seeds": [{"notes": notes}], "hardware": {"cpu": "x", "threads": 1}, "torch": "2",
    }  # fmt: skip


def test_a_task_without_a_row_has_a_dash() -> None:
    table = readme.tasks_table({"one": [row_of("head", 0.5)], "two": [row_of("lora", 0.5)]})
    assert "| `head` | 0.500 ± 0.010 | – | 7 |" in table
    assert "| `lora` | – | 0.500 ± 0.010 | 7 |" in table


def test_a_row_from_before_it_was_counted_has_a_dash_for_what_is_stored():
    rows = [row_of("head", 0.5), row_of("lora", 0.5) | {"stored_parameters": 5}]
    table = readme.tasks_table({"one": rows, "two": [rows[1] | {"stored_parameters": 6}]})
    assert "| method | one, accuracy | two, accuracy | trained parameters | stored |" in table
    assert "| `head` | 0.500 ± 0.010 | – | 7 | – |" in table
    assert "| `lora` | 0.500 ± 0.010 | 0.500 ± 0.010 | 7 | 6 |" in table
    rows = [row | {"total_parameters": 70, "method": row["row"]} for row in rows]
    assert "| 7 | 10 % | – |" in (table := readme.methods_table(rows)) and "| 5 |" in table


def test_every_processor_that_measured_is_named_once() -> None:
    rows = [row_of("head", 0.5), row_of("lora", 0.5), row_of("pst", 0.5)]
    rows[2]["hardware"] = {"cpu": "y", "threads": 2}
    table = readme.tasks_table({"one": rows})
    assert "10 (one); x, 1 thread(s); y, 2 thread(s); torch 2; " in table


def test_each_task_shows_its_metric_and_who_stays_at_the_linear_probe() -> None:
    tasks = {
        "one": [
            row_of(*row) for row in (("head", 0.5), ("lora", 0.5), ("pst", 0.51), ("full", 0.4))
        ],
        "two": [row_of("head", 0.1, "matthews"), row_of("lora", 0.2, "matthews")],
        "three": [row_of("lora", 0.5, notes=["one answer"])],
    }
    table = readme.tasks_table(tasks)
    assert "| method | one, accuracy | two, Matthews | three, accuracy | trained" in table
    assert "| `lora` | 0.500 ± 0.010 | 0.200 ± 0.010 | 0.500 ± 0.010 | 7 |" in table
    assert "On one these reach no more than the linear probe (`head`): `lora`, `full`." in table
    assert "On one these reach more, but by less than seeds differ, than the linear probe " in table
    assert "On two every method measured reaches more than the linear probe (`head`)." in table
    assert table.count("On three") == 1
    assert "On three some runs kept a model that gives one answer only: `lora` in 1." in table
