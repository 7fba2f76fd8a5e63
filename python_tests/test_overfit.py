"""The benchmark that has methods learn pairs by heart, on a file of a few made-up pairs."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import overfit
from benchmarks.readme import by_heart_table
from benchmarks.rows import read


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    names = [f"place{i}" for i in range(12)]
    areas = [f"area{i}" for i in range(8)]
    rows = [f"name : {n} | area : {a}\t{n} is in {a} ." for n in names for a in areas]
    path = tmp_path / "pairs.tsv"
    path.write_text("source\ttarget\n" + "\n".join(rows) + "\n")
    return path


def test_a_row_for_each_method_and_a_table(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    common = ["--data", str(pairs), "--json", str(out), "--families", "llama", "--base-steps", "2"]
    methods = ["control_prefixes", "vlm"]
    asked = ["--methods", ",".join(methods), "--steps", "2", "--beams", "2"]
    assert overfit.main([*common, *asked]) == 0
    rows = read(out)
    assert [row["method"] for row in rows] == methods
    assert all(row["loss"] > 0.1 and row["steps"] == 2 for row in rows)  # too few to learn them
    assert overfit.main([*common, "--steps", "1", "--beams", "2", "--methods", "vlm"]) == 0
    again = read(out)
    assert len(again) == len(rows) and again[-1]["steps"] == 1
    table = by_heart_table(again)
    assert "| `llama` | " in table and "64 targets" in table
