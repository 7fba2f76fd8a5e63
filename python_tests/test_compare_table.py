"""A comparison's folder becomes rows, a block of the page and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_encoder import tiny_model, toy_files

from benchmarks import compare_table, compared, readme
from benchmarks.rows import read, write
from pelt_kernels.training.compare import Comparison, Source, compare

__all__ = ["tiny_model", "toy_files"]


def test_a_folder_becomes_rows_a_table_and_a_picture(
    tiny_model: Path,
    toy_files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = Source("toy", str(toy_files[0]), str(toy_files[1]))
    comparison = Comparison(
        (source,), ("head",), (24,), (0, 1), lr_factors=(1.0,), model=str(tiny_model), epochs=1,
        max_length=16, device="cpu",
    )  # fmt: skip
    compare(comparison, tmp_path / "out", jobs=1)
    monkeypatch.setattr(compared, "RESULTS", tmp_path / "compare.jsonl")
    monkeypatch.setattr(readme, "main", lambda: None)
    assert compare_table.main([str(tmp_path / "out"), "--commit", "0123456789abcdef"]) == 0
    rows = read(tmp_path / "compare.jsonl")
    assert len(rows) == 1 and str(toy_files[0]) not in str(rows)
    shown = compared.table(rows)
    row = rows[0]
    assert f"| 24 | {100 * row['mean']:.1f} ± {100 * row['std']:.1f} |" in shown
    assert "Commit 0123456789." in shown and row["hardware"]["cpu"] in shown
    compared.draw(rows, tmp_path / compared.PICTURE)
    assert (tmp_path / compared.PICTURE).read_bytes().startswith(b"\x89PNG")
    assert compare_table.main([str(tmp_path)]) == 2


def test_rows_of_two_commands_stand_in_one_table_if_their_settings_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def row(task: str, count: int | None, method: str, mean: float) -> dict[str, Any]:
        return {
            "task": task, "train_examples": count, "method": method, "mean": mean,
            "scores": {"0": mean},
            "settings": {"methods": [method], "train_examples": [count], "data_seed": 42},
        }  # fmt: skip

    old = [
        row("trec", 100, "full", 0.7),
        row("trec", 100, "lora", 0.6),
        row("cola", 100, "lora", 0),
    ]
    new = [
        row("trec", None, "lora", 0.9),
        row("trec", 500, "lora", 0.8),
        row("trec", 100, "full", 1),
    ]
    assert compared.difference([*old, *new]) == ""
    found = [
        (r["task"], r["train_examples"], r["method"], r["mean"]) for r in compared.joined(old, new)
    ]
    assert found == [
        ("trec", 100, "full", 1), ("trec", 100, "lora", 0.6), ("trec", 500, "lora", 0.8),
        ("trec", None, "lora", 0.9), ("cola", 100, "lora", 0),
    ]  # fmt: skip
    again = [each | {"commit": "later"} for each in old]
    assert compared.joined(old, again) == compared.joined(old, [])
    other = new[0] | {"settings": {"data_seed": 43}}
    assert compared.difference([*old, other]) == "data_seed 43 and not 42"
    summary = {name: {} for name in compared.SHARED} | {"settings": {"data_seed": 43}}
    monkeypatch.setattr(
        compare_table, "report", lambda folder: summary | {"parameters": {}, "cells": []}
    )
    monkeypatch.setattr(compared, "RESULTS", tmp_path / "compare.jsonl")
    monkeypatch.setattr(readme, "main", lambda: None)
    write(compared.RESULTS, [*old, other])
    assert compare_table.main([str(tmp_path)]) == 2
    assert "data_seed 43 and not 42; --anew drops those rows" in capsys.readouterr().err
    assert len(read(compared.RESULTS)) == 4
    assert compare_table.main([str(tmp_path), "--anew"]) == 0 and not read(compared.RESULTS)
