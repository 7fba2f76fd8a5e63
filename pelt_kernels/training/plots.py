"""The two pictures of an experiment, drawn from the histories of its runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from .storage import replacing

History = Sequence[dict[str, Any]]


def draw_curves(path: Path, title: str, histories: dict[str, History], metric: str) -> None:
    """Training loss and the score on dev over steps, one line for each run."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    figure.suptitle(title)
    for panel, key, name in zip(
        panels, ("loss", f"eval_{metric}"), ("training loss", f"dev {metric}"), strict=True
    ):
        for run, history in histories.items():
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            panel.plot(*_columns(points), marker="o" if len(points) < 30 else "", ms=3, label=run)
        panel.set(xlabel="step", ylabel=name)
        panel.grid(alpha=0.3)
    if len(histories) > 1:
        panels[0].legend(fontsize="small")
    save(figure, path)


def gates_over_steps(history: History) -> dict[str, dict[int, list[tuple[int, float]]]]:
    """(step, mean gate) of each layer, by kind."""
    lines: dict[str, dict[int, list[tuple[int, float]]]] = {}
    for entry in history:
        for name, value in entry.get("gates", {}).items():
            layer, _, kind = name.partition(".")
            lines.setdefault(kind, {}).setdefault(int(layer), []).append((entry["step"], value))
    return lines


def draw_gates(path: Path, title: str, history: History) -> bool:
    """Mean gate per layer over steps, one panel for each kind; False where nothing is gated."""
    lines = gates_over_steps(history)
    if not lines:
        return False
    figure = Figure(figsize=(max(5.0, 3.2 * len(lines)), 3.4), layout="constrained")
    panels = figure.subplots(1, len(lines), sharey=True, squeeze=False)[0]
    figure.suptitle(title)
    viridis = colormaps["viridis"]
    for panel, (kind, layers) in zip(panels, lines.items(), strict=True):
        for layer, points in sorted(layers.items()):
            shade = viridis(layer / (max(layers) + 1))  # the lightest would be lost on white
            panel.plot(*_columns(points), color=shade, label=f"layer {layer}")
        panel.set(title=kind, xlabel="step", ylim=(0, 1))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("mean gate")
    panels[-1].legend(fontsize="x-small")
    save(figure, path)
    return True


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG whole or not at all. Raises RunError."""
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
