"""What `benchmarks.active` measured, as a line, a table and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # there need not be a screen
from matplotlib import pyplot

from pelt_kernels.training.gate_report.active import percent

from . import figures
from .checkout import ROOT
from .rows import Rows, measured_by

RESULTS = ROOT / "benchmarks" / "results" / "active.jsonl"
PICTURE = "active.png"
COLOURS = (figures.BLUE, figures.ORANGE, "#009E73", "#CC79A7", figures.BLACK, "#56B4E9")
LEAST_SPAN = 0.1  # of scores in a panel, so that a few texts do not look like a cliff
TITLES = (
    "run", "threshold", "score", "parts that work", "parameters", "operations", "time, 1 text",
    "time, 32 texts",
)  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """A row for a terminal."""
    one, many = (row["times"][batch]["processor_share"]["median"] for batch in ("1", "32"))
    return (
        f"{row['task']:8} {row['run']:28} {_threshold(row):>5}  score {row['score']:.3f}  "
        f"parts {row['parts']:6.1%}  parameters {row['parameters']:12,.0f}  time {one:.2f} "
        f"{many:.2f}"
    )


def table(rows: Rows) -> str:
    """A line for each run and threshold, in Markdown. A threshold at which nothing is skipped is
    left out, but for 0, which tells what it costs to ask.
    """
    lines = [f"| {' | '.join(TITLES)} |", "|---" * len(TITLES) + "|"]
    for found in _by_run(rows):
        whole = found[0]["added_flops"] + found[0]["base_flops"]
        for row in found:
            if row["parts"] == 1 and row["threshold"]:
                continue
            cells = [
                f"{row['task']}, `{row['run']}`",
                _threshold(row),
                f"{row['score']:.3f}",
                percent(row["parts"]),
                f"{row['parameters']:,.0f}",
                percent((row["added_flops"] + row["base_flops"]) / whole),
                *(_share(row["times"][batch]["processor_share"]) for batch in ("1", "32")),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _conditions(rows)]) + "\n"


def _by_run(rows: Rows) -> Iterator[Rows]:
    """The rows of each run, that without a threshold first."""
    for key in dict.fromkeys((row["task"], row["run"]) for row in rows):
        found = [row for row in rows if (row["task"], row["run"]) == key]
        yield sorted(found, key=lambda row: -1.0 if row["threshold"] is None else row["threshold"])


def _threshold(row: dict[str, Any]) -> str:
    return "none" if row["threshold"] is None else f"{row['threshold']:g}"


def _share(found: dict[str, float]) -> str:
    """A median and the 20th and 80th of a hundred rounds."""
    if found["low"] == found["high"]:
        return f"{found['median']:.2f}"
    return f"{found['median']:.2f} ({found['low']:.2f}–{found['high']:.2f})"


def _conditions(rows: Sequence[dict[str, Any]]) -> str:
    sizes = dict.fromkeys(
        f"{row['task']}: {row['texts']:,} test texts, {row['train_examples'] or 'all'} to train on"
        for row in rows
    )
    timed = [
        f"{found['rounds']} rounds over {found['texts']} texts in batches of {batch}"
        for row in rows
        for batch, found in row["times"].items()
    ]
    return (
        f"{'; '.join(sizes)}. Parts, parameters and operations are means over the test texts, by "
        f"formula; operations are those of the layers with the method, without a threshold 100 %. "
        f"Times are of the processor, as shares of the run's own without a threshold: medians of "
        f"{', '.join(dict.fromkeys(timed))}, in turns, in brackets the 20th and 80th of a hundred; "
        f"the machine was shared. {measured_by(rows)}."
    )


def draw(rows: Rows, path: Path) -> None:
    """Score and time over the threshold, a column for each task and a colour for each run."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, grid = pyplot.subplots(
        2, len(tasks), figsize=(2.0 + 3.6 * len(tasks), 5.6), squeeze=False, sharex=True,
        layout="constrained",
    )  # fmt: skip
    for column, task in enumerate(tasks):
        score, time = grid[0][column], grid[1][column]
        runs = _by_run([row for row in rows if row["task"] == task])
        for number, found in enumerate(runs):
            colour = COLOURS[number % len(COLOURS)]
            at = [row["threshold"] for row in found[1:]]
            score.plot(at, [row["score"] for row in found[1:]], "o-", ms=4, color=colour,
                       label=found[0]["run"])  # fmt: skip
            score.axhline(found[0]["score"], color=colour, lw=0.8, ls=":")
            for batch, style in (("1", "--"), ("32", "-")):
                shares = [row["times"][batch]["processor_share"]["median"] for row in found[1:]]
                time.plot(at, shares, f"o{style}", ms=4, color=colour)
        scores = [row["score"] for row in rows if row["task"] == task]
        middle = (min(scores) + max(scores)) / 2
        half = max(LEAST_SPAN, 1.1 * (max(scores) - min(scores))) / 2
        score.set_ylim(middle - half, middle + half)
        time.set_ylim(bottom=0)
        time.axhline(1.0, color=figures.BLACK, lw=0.8)
        score.set(title=task, ylabel=figures.METRIC_NAMES[rows[0]["metric"]])
        time.set(xlabel="threshold", ylabel="time, share of without")
        score.legend(fontsize="x-small")
        for panel in (score, time):
            panel.grid(alpha=0.3)
    words = "Dotted: score without a threshold. Time for one text dashed, in batches of 32 solid"
    figures.finish(figure, rows, words, path)
