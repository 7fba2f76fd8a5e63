"""The methods side by side: the table and the picture of what `benchmarks.compare_table` keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pelt_kernels.training.compare.plots import draw_scores
from pelt_kernels.training.compare.protocol import GROWING, size_name
from pelt_kernels.training.compare.summary import summed_up
from pelt_kernels.training.compare.tables import markdown

from .checkout import ROOT
from .rows import Rows, by_processor, commits, once

RESULTS = ROOT / "benchmarks" / "results" / "compare.jsonl"
PICTURE = "compare.png"
SHARED = ("settings", "hardware", "versions")  # of a command's rows, each of which has a copy
# What may differ between the commands that a table is made by; each row says its own metric.
FREE = (*GROWING, "metrics")


def difference(rows: Rows) -> str:
    """What of the settings keeps rows out of one table; empty if nothing does."""
    for row in rows:
        for name, value in row["settings"].items():
            expected = rows[0]["settings"].get(name)
            if name not in FREE and value != expected:
                return f"{name} {value} and not {expected}"
    return ""


def joined(old: Rows, new: Rows) -> Rows:
    """All rows, a new one in place of an old one of the same cell, unless its scores are the same
    and the old one says at which commit they were reached; tasks and methods in the order in which
    they first come, fewer training examples before more.
    """

    def cell(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["task"], row["train_examples"], row["method"]

    rows = {cell(row): row for row in old}
    for row in new:
        before = rows.get(cell(row))
        if before is None or before["scores"] != row["scores"]:
            rows[cell(row)] = row
    tasks, methods = (once(row[key] for row in [*old, *new]) for key in ("task", "method"))

    def order(row: dict[str, Any]) -> tuple[int, float, int]:
        count = row["train_examples"]
        return (
            tasks.index(row["task"]),
            float("inf") if count is None else count,
            methods.index(row["method"]),
        )

    return sorted(rows.values(), key=order)


def table(rows: Rows) -> str:
    """All tables of the comparison in Markdown, with its conditions and the commit."""
    summary = {
        **summed_up(rows),
        "settings": rows[0]["settings"],
        "hardware": {"cpu": _processors(rows)},
        "versions": {"torch": ", ".join(once(row["versions"]["torch"] for row in rows))},
        "cells": rows,
        "parameters": {row["method"]: row["parameters"] for row in rows},
    }
    picture = f"![Scores of each method by the number of training examples]({PICTURE})"
    return f"{markdown(summary).rstrip()} Commit {commits(rows)}.\n\n{picture}\n"


def _processors(rows: Rows) -> str:
    """The processors; where there are several, with the K that each trained with."""
    groups = by_processor(rows)
    named = []
    for found in groups:
        counts = once(size_name(row["train_examples"]) for row in found)
        of = f" (K {', '.join(counts)})" if len(groups) > 1 else ""
        named.append(", ".join(once(row["hardware"]["cpu"] for row in found)) + of)
    return "; ".join(named)


def draw(rows: Rows, path: Path) -> None:
    """The picture of the same rows."""
    draw_scores(path, {**summed_up(rows), "cells": rows})
