"""Skipping at several thresholds: what is measured of a run, and how it is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_encoder import tiny_model, toy_files

from benchmarks import active, active_table
from benchmarks.rows import read
from pelt_kernels.models import PeltModel
from pelt_kernels.training import TrainConfig, train

__all__ = ["tiny_model", "toy_files"]


def test_a_run_has_a_row_for_each_threshold(
    tiny_model: Path,
    toy_files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(active, "TIMED", {1: 4, 32: 4})
    run, file = tmp_path / "run", tmp_path / "rows.jsonl"
    config = TrainConfig(
        task=str(toy_files[0]), eval=str(toy_files[1]), model=str(tiny_model), train_examples=32,
        epochs=1, batch_size=16, max_length=16, device="cpu", method="unipelt",
        options=("gate_penalty=0.1", "gate_penalty_kind=l1"),
    )  # fmt: skip
    train(config, run)
    command = [str(run), "--rounds", "1", "--json", str(file)]
    assert active.main(command) == 0
    rows = read(file)
    assert [row["threshold"] for row in rows] == list(active.THRESHOLDS)
    metrics = json.loads((run / "metrics.json").read_text())
    without, asked, *_, last = rows
    assert without["score"] == asked["score"] == pytest.approx(metrics["accuracy"])
    assert (without["trained"], without["stored"]) == (
        metrics["trainable_parameters"], metrics["stored_parameters"],
    )  # fmt: skip
    assert without["parameters"] == asked["parameters"] == without["stored"]
    assert last["parts"] < 1 and last["parameters"] < without["stored"]  # gates start near 0.5
    assert without["gate_penalty"] == 0.1 and without["gate_penalty_kind"] == "l1"
    assert all(row["times"]["1"]["texts"] == row["times"]["32"]["texts"] == 4 for row in rows)
    for found in without["times"].values():
        assert found["share"] == {"median": 1, "low": 1, "high": 1} and found["seconds"] > 0
    active.write(file, [without | {"run": "another"}, without])
    assert active.main(command) == 0
    assert [row["run"] for row in read(file)] == ["another", *["run"] * len(rows)]
    monkeypatch.setattr(PeltModel, "why_not_countable", lambda model: "a reason")
    assert active.main(command) == 0 and "run left out, a reason" in capsys.readouterr().err
    active_table.draw(rows, tmp_path / "active.png")
    assert (tmp_path / "active.png").stat().st_size < 100_000


def row_of(threshold: float | None, parts: float, share: float) -> dict[str, Any]:
    found = {"median": share, "low": share, "high": share + 0.1 * (share != 1)}
    times = {"processor_share": found, "texts": 64, "rounds": 9}
    return {
        "task": "toy", "run": "mine", "threshold": threshold, "parts": parts, "score": 0.5,
        "parameters": 1000 * parts, "added_flops": 10 * parts, "base_flops": 90.0, "texts": 500,
        "train_examples": None, "times": {"1": times, "32": times}, "commit": "0" * 40,
        "hardware": {"cpu": "x", "threads": 1, "gpu": None}, "versions": {"torch": "2"},
    }  # fmt: skip


def test_the_table_leaves_out_thresholds_that_skip_nothing() -> None:
    rows = [row_of(0.5, 0.25, 0.9), row_of(0.1, 1, 1.1), row_of(0.0, 1, 1.2), row_of(None, 1, 1)]
    _, _, none, zero, half, *rest = active_table.table(rows).splitlines()
    assert none == "| toy, `mine` | none | 0.500 | 100 % | 1,000 | 100 % | 1.00 | 1.00 |"
    assert zero.startswith("| toy, `mine` | 0 | ") and "| 1.20 (1.20–1.30) |" in zero
    assert half.startswith("| toy, `mine` | 0.5 | 0.500 | 25 % | 250 | 92.5 % | 0.90 (")
    assert rest[0] == "" and rest[1].startswith("toy: 500 test texts, all to train on. ")
    assert "medians of 9 rounds over 64 texts in batches of 1, 9 rounds over 64" in rest[1]
