"""The methods side by side: the table and the picture of what `benchmarks.compare_table` keeps."""

from __future__ import annotations

from pathlib import Path

from pelt_kernels.training.compare.plots import draw_scores
from pelt_kernels.training.compare.summary import summed_up
from pelt_kernels.training.compare.tables import markdown

from .checkout import ROOT
from .rows import Rows, commits

RESULTS = ROOT / "benchmarks" / "results" / "compare.jsonl"
PICTURE = "compare.png"
SHARED = ("settings", "hardware", "versions")  # of all rows, each of which has its own copy


def table(rows: Rows) -> str:
    """All tables of the comparison in Markdown, with its conditions and the commit."""
    first = rows[0]
    summary = {
        **summed_up(rows),
        **{name: first[name] for name in SHARED},
        "cells": rows,
        "parameters": {row["method"]: row["parameters"] for row in rows},
    }
    picture = f"![Scores of each method by the number of training examples]({PICTURE})"
    return f"{markdown(summary).rstrip()} Commit {commits(rows)}.\n\n{picture}\n"


def draw(rows: Rows, path: Path) -> None:
    """The picture of the same rows."""
    draw_scores(path, {**summed_up(rows), "cells": rows})
