"""The picture of a comparison."""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from ..plots import save
from .protocol import size_name

COLUMNS = 3


def draw_scores(path: Path, summary: dict[str, Any]) -> None:
    """Scores by K, a panel for each task and one for their average, a line for each method; bars
    are standard deviations over seeds.
    """
    tasks, counts = summary["tasks"], summary["train_examples"]
    titles = [*tasks, *(["average"] if len(tasks) > 1 else [])]
    columns = min(COLUMNS, len(titles))
    rows = ceil(len(titles) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    colours = colormaps["tab10"]
    for panel, title in zip(panels, titles, strict=False):
        is_average = title == "average" and title not in tasks
        found = (
            summary["averages"]
            if is_average
            else [cell for cell in summary["cells"] if cell["task"] == title]
        )
        for number, method in enumerate(summary["methods"]):
            mine = {row["train_examples"]: row for row in found if row["method"] == method}
            # Side by side, so that bars do not hide each other.
            shift = 0.03 * (number - len(summary["methods"]) / 2)
            points = [(place, mine[k]) for place, k in enumerate(counts) if k in mine]
            panel.errorbar(
                [place + shift for place, _ in points],
                [row["mean"] for _, row in points],
                yerr=[row["std"] for _, row in points],
                marker="o", ms=3, lw=1.2, capsize=2, label=method,
                color=colours(number % 10), ls="-" if number < 10 else "--",
            )  # fmt: skip
        metric = "mean of the scores" if is_average else summary["metrics"].get(title, "")
        panel.set(title=title, ylabel=metric, xlabel="training examples")
        panel.set_xticks(range(len(counts)), [size_name(k) for k in counts])
        panel.grid(alpha=0.3)
    for panel in panels[len(titles) :]:
        panel.set_axis_off()
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=5,
        fontsize="small",
    )
    save(figure, path)
