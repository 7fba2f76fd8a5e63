"""A comparison's folder becomes rows, a block of the page and a picture."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_encoder import tiny_model, toy_files

from benchmarks import compare_table, compared, readme
from benchmarks.rows import read
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
