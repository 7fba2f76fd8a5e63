"""How time grows with each size: one panel a letter, logarithmic both ways, with the least time
that the machine allows.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # there need not be a screen
from matplotlib import pyplot

COLOURS = {
    "plain": "tab:gray", "cuda": "tab:green", "cuda:single": "tab:green",
    "cuda:composed": "tab:olive", "triton": "tab:orange", "cpu": "tab:blue",
}  # fmt: skip
PEERS = ("tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:cyan")


def draw_sweeps(operator: str, points: list[dict[str, Any]], folder: Path) -> Path:
    """Draws an operator's sweeps into ``folder`` and tells where."""
    letters = list(dict.fromkeys(point["letter"] for point in points))
    directions = list(dict.fromkeys(point["direction"] for point in points))
    figure, grid = pyplot.subplots(
        len(directions), len(letters), figsize=(3.6 * len(letters), 2.9 * len(directions)),
        sharey="row", squeeze=False, layout="constrained",
    )  # fmt: skip
    for line, direction in enumerate(directions):
        for column, letter in enumerate(letters):
            chosen = [p for p in points if p["letter"] == letter and p["direction"] == direction]
            _draw_panel(grid[line][column], chosen)
            grid[line][column].set_xlabel(f"{letter}  ({_fixed(chosen[0]['case'], letter)})")
        grid[line][0].set_ylabel(f"{direction}, ms")
    grid[0][0].legend(fontsize="small")
    first = points[0]
    figure.suptitle(f"{operator}, {first['dtype']}: {first['hardware']}", fontsize="medium")
    path = folder / f"{operator}.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _draw_panel(axes: Any, points: list[dict[str, Any]]) -> None:
    lines: dict[str, dict[int, float]] = {}
    for point in points:
        lines.setdefault(point["baseline"], {})[point["size"]] = point["baseline_us"]
        lines.setdefault(point["backend"], {})[point["size"]] = point["us"]
        lines.setdefault("limit", {})[point["size"]] = point["limit_us"]
    peers = [name for name in lines if name not in COLOURS and name != "limit"]
    colours = {**COLOURS, **dict(zip(peers, itertools.cycle(PEERS)))}
    for name, line in lines.items():
        sizes = sorted(line)
        style = {"color": "black", "ls": ":"} if name == "limit" else {
            "color": colours[name], "marker": "o", "ms": 3}  # fmt: skip
        axes.plot(sizes, [line[size] / 1e3 for size in sizes], label=name, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)


def _fixed(case: str, letter: str) -> str:
    """The other sizes of a case's name."""
    return " ".join(part for part in case.split("-") if part[0] != letter)
