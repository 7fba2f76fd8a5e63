"""The pictures of what was measured, from the rows as they are: scores of the methods over their
trained parameters, and what a training step takes. Each names the processor of its rows.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # there need not be a screen
from matplotlib import pyplot

from . import peft_tables
from .rows import Rows, by_processor

# Okabe and Ito's, which the colour-blind tell apart.
BLUE, ORANGE, BLACK = "#0072B2", "#E69F00", "#000000"
DPI = 110
METRIC_NAMES = {"accuracy": "accuracy", "f1": "F1", "matthews": "Matthews"}


def draw_accuracy(tasks: dict[str, Rows], path: Path) -> None:
    """A panel for each task: the mean score of each method with the seeds' deviation, a line for
    each method, from the fewest trained parameters to the most.
    """
    trained: dict[str, int] = {}
    for row in (row for rows in tasks.values() for row in rows):
        trained[_name(row)] = max(row["trainable_parameters"], trained.get(_name(row), 0))
    order = sorted(trained, key=lambda name: -trained[name])
    figure, panels = pyplot.subplots(
        1, len(tasks), figsize=(2.4 + 1.9 * len(tasks), 1.3 + 0.24 * len(order)),
        sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    for panel, (task, rows) in zip(panels[0], tasks.items()):
        metric = rows[0].get("metric", "accuracy")
        scores = [row[metric] for row in rows]
        panel.errorbar(
            [score["mean"] for score in scores], [order.index(_name(row)) for row in rows],
            xerr=[score["std"] for score in scores], fmt="o", ms=5, color=BLUE, elinewidth=1.2,
        )  # fmt: skip
        examples = rows[0]["train_examples"]
        panel.set(
            title=f"{task}, {examples:,} examples", xlabel=f"{METRIC_NAMES[metric]}, test part"
        )
        panel.title.set_fontsize("small")
        panel.grid(alpha=0.3)
    labels = [f"{name}  {_short(trained[name])}" for name in order]
    panels[0][0].set_yticks(range(len(order)), labels)
    panels[0][0].set_ylabel("method, trained parameters")
    every = [row for rows in tasks.values() for row in rows]
    finish(figure, every, "mean and deviation of seeds", path)


def draw_steps(rows: Rows, path: Path) -> None:
    """What an accelerated PEFT model takes of what PEFT's own takes: time of a training step and of
    a forward, with the 20th and 80th of a hundred rounds, and peak memory of a step; on the
    processor with the most rows.
    """
    rows = max(by_processor(rows), key=len)
    labels = [
        f"{peft_tables.NAMES[row['model']].split(',')[0]}, "
        f"{peft_tables.METHODS[row['method']]}, {row['dtype']}"
        for row in rows
    ]
    shares = [row["peak_bytes"] / max(row["peft_peak_bytes"], 1) for row in rows]
    columns: list[tuple[str, list[float], Any]] = [
        ("time of a training step", *_times(rows, "training")),
        ("time of a forward", *_times(rows, "inference")),
        ("peak memory of a step", shares, None),
    ]
    colours = [ORANGE if row["method"].startswith("prefix") else BLUE for row in rows]
    figure, panels = _bars(labels, columns, colours)
    for panel in panels:
        panel.axvline(1.0, color=BLACK, lw=1)
    finish(figure, rows, "PEFT as shipped = 1; shorter is better", path)


def draw_methods(rows: Rows, path: Path) -> None:
    """What a training step of each method takes: processor time, and memory for backward."""
    columns = [
        ("processor time, ms", [1e3 * row["processor_seconds"] for row in rows], None),
        ("kept for backward, MiB", [row["saved_bytes"] / 2**20 for row in rows], None),
        ("peak of the process, MiB", [row["peak_bytes"] / 2**20 for row in rows], None),
    ]
    figure, _ = _bars([row["method"] for row in rows], columns, [BLUE] * len(rows))
    finish(figure, rows, f"one step of {rows[0]['batch']} texts; shorter is better", path)


def draw_bars(
    path: Path,
    labels: Sequence[str],
    columns: Sequence[tuple[str, Sequence[float], Any]],
    colours: Sequence[str],
    words: str,
    rows: Rows,
) -> None:
    """A picture of `_bars` with the words and the machines of the rows below it; a line at 100 in
    the panels of shares.
    """
    figure, panels = _bars(labels, columns, colours)
    for panel, (title, *_) in zip(panels, columns):
        if "%" in title:
            panel.axvline(100.0, color=BLACK, lw=1)
    finish(figure, rows, words, path)


def _bars(
    labels: Sequence[str],
    columns: Sequence[tuple[str, Sequence[float], Any]],
    colours: Sequence[str],
) -> tuple[Any, Any]:
    """A panel for each column of values and, where there is one, their range; a bar for each label,
    the first on top.
    """
    figure, panels = pyplot.subplots(
        1, len(columns), figsize=(9.5, 1.1 + 0.27 * len(labels)), sharey=True, layout="constrained"
    )
    for panel, (title, values, spread) in zip(panels, columns):
        panel.barh(range(len(labels)), values, 0.65, color=colours, xerr=spread,
                   error_kw={"elinewidth": 1.2, "ecolor": BLACK})  # fmt: skip
        panel.set_title(title, fontsize="medium")
        panel.grid(axis="x", alpha=0.3)
        panel.set_axisbelow(True)
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].invert_yaxis()
    return figure, panels


def _times(rows: Rows, kind: str) -> tuple[list[float], list[list[float]]]:
    """The times' shares of PEFT's, and how far the rounds reach below and above."""
    speedups = [row[kind]["speedup"] for row in rows]
    shares = [1 / found["median"] for found in speedups]
    below = [share - 1 / found["high"] for share, found in zip(shares, speedups)]
    above = [1 / found["low"] - share for share, found in zip(shares, speedups)]
    return shares, [below, above]


def _name(row: dict[str, Any]) -> str:
    return row.get("row", row["method"])


def _short(count: int) -> str:
    """Three digits at most: 770, 76 k, 2.8 M."""
    if count < 1000:
        return str(count)
    if count < 999_500:
        return f"{count / 1e3:.0f} k"
    return f"{count / 1e6:.3g} M" if count >= 9.95e6 else f"{count / 1e6:.1f} M"


def finish(figure: Any, rows: Rows, words: str, path: Path) -> None:
    """Writes the words and the machines of the rows below a figure, and saves it."""
    machines = dict.fromkeys(row["hardware"]["gpu"] or row["hardware"]["cpu"] for row in rows)
    width = min(120, round(12.6 * figure.get_figwidth()))  # as many letters are as wide
    lines = textwrap.wrap(f"{words}. {'; '.join(machines)}", width)
    figure.supxlabel("\n".join(lines), fontsize="small")
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)
