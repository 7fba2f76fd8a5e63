"""The drawings of the page: tables coloured as heat maps, and SVG that takes the page's colours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import copysign, sqrt
from typing import Any

Json = dict[str, Any]
Cells = Mapping[tuple[int, str], Any]  # by layer and kind
COLOURS = 8  # of labels, as many as the style has


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map: its text, its colour as CSS, a class, and what a pointer is told."""

    text: str
    colour: str = ""
    kind: str = ""
    title: str = ""


def heat_map(title: str, cells: Mapping[tuple[int, str], Cell], kinds: Mapping[str, str]) -> str:
    """Layers in rows, kinds (with their words) in columns."""
    layers = sorted({layer for layer, _ in cells})
    head = "".join(f"<th scope=col>{escape(word)}</th>" for word in kinds.values())
    body = "".join(
        f"<tr><th scope=row>{layer}</th>{''.join(_cell(cells.get((layer, k))) for k in kinds)}</tr>"
        for layer in layers
    )
    return (
        f"<h3>{escape(title)}</h3><table class=heat><thead><tr><th scope=col>layer</th>{head}</tr>"
        f"</thead><tbody>{body}</tbody></table>"
    )


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "<td class=faint>–</td>"
    style = f' style="background:{cell.colour}"' if cell.colour else ""
    kind = f' class="{cell.kind}"' if cell.kind else ""
    return f'<td{kind}{style} title="{escape(cell.title)}">{escape(cell.text)}</td>'


def mixed(colour: str, share: float) -> str:
    """A share of a colour of the style in the colour of an empty cell."""
    return f"color-mix(in oklab, var(--{colour}) {100 * min(1.0, share):.0f}%, var(--cell))"


def scale(least: str, most: str, *colours: str) -> str:
    """A legend of colours that run into each other."""
    run = ", ".join(colours)
    return (
        f'<div class=scale><span>{escape(least)}</span><i style="background:linear-gradient(90deg, '
        f'{run})"></i><span>{escape(most)}</span></div>'
    )


@dataclass(frozen=True)
class Axis:
    """Maps values to places of a drawing, and has ticks at round numbers."""

    least: float
    most: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.least) / (self.most - self.least)
        return self.start + share * (self.end - self.start)

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float, gap: float = 0.04) -> Axis:
        """Of all the values, and never narrower than twice the gap."""
        least, most = min(values), max(values)
        gap = max(gap * (most - least), gap - (most - least) / 2)
        return cls(max(0.0, least - gap), min(1.0, most + gap), start, end)

    def ticks(self) -> list[float]:
        """Three to eight round numbers."""
        width = self.most - self.least
        step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25) if width / step <= 7)
        first = int(self.least / step) + 1
        return [
            round(step * count, 4)
            for count in range(first - 1, first + 9)
            if self.least <= step * count <= self.most + 1e-9
        ]


def distributions(gates: Sequence[Json], group: str, names: Sequence[str], axis: Axis) -> str:
    """Of one kind of gate: for each layer and group (label or task) the middle nine tenths as a
    line, the middle half as a bar, the median as a dot.
    """
    width, row, gap, top = 360.0, 7.5, 8.0, 6.0
    parts, y = [], top
    for gate in gates:
        height = row * len(names)
        parts.append(f'<text x="2" y="{y + height / 2 + 4:.1f}">{gate["layer"]}</text>')
        for place, name in enumerate(names):
            summary = gate[group].get(name)
            if summary is not None:
                parts.append(_box(summary, axis, y + row * (place + 0.5), place, gate, name))
        y += height + gap
    ticks = "".join(
        f'<line class=axis x1="{axis(tick):.1f}" x2="{axis(tick):.1f}" y1="0" y2="{y:.1f}"/>'
        f'<text x="{axis(tick):.1f}" y="{y + 13:.1f}" text-anchor=middle>{tick:g}</text>'
        for tick in axis.ticks()
    )
    return f'<svg viewBox="0 0 {width:.0f} {y + 18:.1f}" role=img>{ticks}{"".join(parts)}</svg>'


def _box(summary: Json, axis: Axis, y: float, colour: int, gate: Json, name: str) -> str:
    low, first, middle, third, high = (axis(value) for value in summary["quantiles"])
    said = (
        f"layer {gate['layer']}, {name}: mean {summary['mean']:.3f}, standard deviation "
        f"{summary['std']:.3f}, {summary['rows']} texts"
    )
    fill = f"var(--c{colour % COLOURS})"
    return (
        f'<g><title>{escape(said)}</title><line x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" '
        f'y2="{y:.1f}" stroke="{fill}" stroke-width="1.2"/><rect x="{first:.1f}" y="{y - 2.6:.1f}" '
        f'width="{max(0.8, third - first):.1f}" height="5.2" rx="1.5" fill="{fill}" '
        f'fill-opacity="0.55"/><circle cx="{middle:.1f}" cy="{y:.1f}" r="2.2" fill="{fill}"/></g>'
    )


def lines(series: Mapping[int, Sequence[tuple[float, float]]], axis: Axis, steps: float) -> str:
    """Lines by layer over the steps; `axis` is the vertical one."""
    width, height, left, right = 360.0, 190.0, 30.0, 342.0
    most = max(series) or 1
    across = Axis(0.0, steps or 1.0, left, right)
    grid = "".join(
        f'<line class=axis x1="{left}" x2="{right}" y1="{axis(tick):.1f}" y2="{axis(tick):.1f}"/>'
        f'<text x="{left - 4}" y="{axis(tick) + 4:.1f}" text-anchor=end>{tick:g}</text>'
        for tick in axis.ticks()
    )
    drawn: list[str] = []
    taken: list[float] = []
    for layer, points in sorted(series.items(), key=lambda item: -item[1][-1][1]):
        path = " ".join(f"{across(x):.1f},{axis(y):.1f}" for x, y in points)
        colour = f"color-mix(in oklab, var(--last) {100 * layer / most:.0f}%, var(--first))"
        drawn.append(
            f"<g><title>layer {layer}</title>"
            f'<polyline points="{path}" fill=none stroke="{colour}" stroke-width="1.8" '
            "stroke-linejoin=round /></g>"
        )
        y = axis(points[-1][1]) + 4
        y = max(y, taken[-1] + 10) if taken else y  # numbers do not cover each other
        taken.append(y)
        drawn.append(f'<text x="{right + 5}" y="{y:.1f}">{layer}</text>')
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role=img>{grid}{"".join(drawn)}'
        f'<text x="{left}" y="{height - 4}">step 0</text>'
        f'<text x="{right}" y="{height - 4}" text-anchor=end>{steps:.0f}</text></svg>'
    )


def forest_axis(bounds: Sequence[float], width: float = 250.0) -> Callable[[float], float]:
    """Places of differences, by their signed roots: small ones stay visible beside large ones."""
    least = min(-0.005, *bounds)
    most = max(0.005, *bounds)

    def root(value: float) -> float:
        return copysign(sqrt(abs(value)), value)

    axis = Axis(root(least), root(most), 6.0, width - 6.0)
    return lambda value: axis(root(value))


def forest(row: Json, place: Callable[[float], float], kind: str) -> str:
    """One difference as a dot with its interval, beside the line of no difference."""
    low, high = (place(bound) for bound in row["difference"]["interval"])
    colour = f"var(--{kind})"
    return (
        f'<svg viewBox="0 0 250 20" role=img><line class=zero x1="{place(0):.1f}" '
        f'x2="{place(0):.1f}" y1="0" y2="20"/><line x1="{low:.1f}" x2="{high:.1f}" y1="10" y2="10" '
        f'stroke="{colour}" stroke-width="2"/><circle cx="{place(row["difference"]["value"]):.1f}" '
        f'cy="10" r="3.6" fill="{colour}"/></svg>'
    )


def forest_ticks(bounds: Sequence[float], place: Callable[[float], float]) -> str:
    """The numbers above the differences, in points."""
    shown: list[tuple[float, str]] = [(place(0.0), "0")]
    for size in (0.3, 0.1, 0.03, 0.01, 0.003):
        for value in (-size, size):
            x = place(value)
            inside = min(bounds) <= value <= max(bounds)
            if inside and all(abs(x - other) > 26 for other, _ in shown):
                shown.append((x, f"{100 * value:+g}".replace("-", "−")))
    ticks = "".join(
        f'<text x="{x:.1f}" y="11" text-anchor=middle>{text}</text>' for x, text in shown
    )
    return f'<svg viewBox="0 0 250 14" role=img>{ticks}</svg>'
