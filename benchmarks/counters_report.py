"""Counts of `benchmarks.counters` as people read them: tables of one case, and the page's table."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from . import pipes
from .instructions import family_of
from .pipes import ALIKE, GPUS, Launch
from .rows import Rows, commits

WHAT = (
    "Counts of PTX instructions on the simulator and a lower bound from them, not a measurement: "
    "no GPU has run here, latency is not in it, and of registers PTX tells nothing."
)
HOTTEST = 10
_INCLUDED = re.compile(r"/\S*/include/")  # the toolkit's own headers
Launches = dict[str, dict[str, list[Launch]]]


def show(rows: Rows, by_gpu: Launches, gpus: Sequence[str], is_short: bool) -> None:
    """Prints each direction of a case; the short form leaves out launches and lines."""
    console = Console(width=120, highlight=False)
    for row in rows:
        launches = by_gpu[ALIKE.get(gpus[-1], gpus[-1])][row["direction"]]
        title = " ".join(row[key] for key in ("op", "case", "dtype", "direction"))
        console.print(f"\n[bold]{title}[/], by {row['request']}")
        console.print(_summary(row))
        console.print(_bounds(row))
        if is_short:
            continue
        console.print(_launches(launches, gpus[-1]))
        console.print(_kinds(launches))
        console.print(_hottest(launches))


def _table(title: str, *columns: str, left: int = 1) -> Table:
    table = Table(title=title, title_justify="left")
    for at, column in enumerate(columns):
        table.add_column(column, justify="left" if at < left else "right", overflow="fold")
    return table


def _summary(row: dict[str, Any]) -> str:
    per_mma = "" if row["per_mma"] is None else (
        f", {row['per_mma']:.1f} for each mma; {row['mma']:,} mma, "
        + (f"{row['mma'] / row['least_mma']:.2f}x the least" if row["least_mma"] else "")
    )  # fmt: skip
    least = row["least_bytes"]
    return (
        f"{row['issued']:,} issued ({row['folded'] / row['issued']:.0%} moves and the like that "
        f"the assembler folds away), {row['lanes']:.1f} lanes active, "
        f"{row['per_16_bytes']:.1f} for 16 bytes that have to move{per_mma}\n"
        f"global memory: asked {row['asked_bytes'] / least:.2f}x the least, sectors of warps "
        f"{pipes.SECTOR * row['sectors'] / least:.2f}x, second-level cache at least "
        f"{row['cache_bytes'] / least:.2f}x, memory at least {row['memory_bytes'] / least:.2f}x "
        f"of {least:,} bytes\n"
        f"shared memory: {row['wavefronts']:,} wavefronts, "
        f"{row['wavefronts'] / max(row['least_wavefronts'], 1):.2f}x the least"
    )


def _bounds(row: dict[str, Any]) -> Table:
    table = _table("least time of each pipe, us", "GPU", *pipes.PIPES, "bound", "by")
    for gpu, bound in row["bounds"].items():
        times = [f"{bound['pipes'][pipe]:,.2f}" for pipe in pipes.PIPES]
        table.add_row(gpu, *times, f"{bound['us']:,.2f}", bound["by"])
    return table


def _launches(launches: list[Launch], gpu: str) -> Table:
    table = _table(
        f"launches on {gpu}: as many warps for each scheduler, as many KB under way with one load "
        "of each warp, as many loads of each warp needed for the memory's rate",
        "kernel", "blocks", "threads", "shared", "issued", "warps", "KB", "loads", "us", "by",
    )  # fmt: skip
    for launch in launches:
        warps, under_way, loads = pipes.occupancy(launch, GPUS[gpu])
        time, by, _ = pipes.bound([launch], GPUS[gpu])
        table.add_row(
            launch["kernel"], f"{pipes.blocks_of(launch):,}", str(launch["threads"]),
            f"{launch['shared_bytes']:,}",
            f"{sum(row.issued for row in pipes.instructions_of(launch)):,}",
            f"{warps:.1f}", f"{under_way / 1e3:,.0f}", f"{loads:.1f}",
            f"{1e6 * time:,.2f}", by,
        )  # fmt: skip
    return table


def _kinds(launches: list[Launch]) -> Table:
    names = [f"{at}: {launch['kernel'].split('<')[0]}" for at, launch in enumerate(launches)]
    counts = []
    for launch in launches:
        kinds: Counter[str] = Counter()
        for row in pipes.instructions_of(launch):
            kinds[family_of(row.name)] += row.issued
        counts.append(kinds)
    table = _table("issued by kind", "kind", *names)
    for family, _ in sum(counts, Counter()).most_common():
        cells = [f"{c[family]:,} ({c[family] / c.total():.0%})" for c in counts]
        table.add_row(family, *cells)
    return table


def _hottest(launches: list[Launch]) -> Table:
    lines: Counter[str] = Counter()
    for launch in launches:
        for row in pipes.instructions_of(launch):
            lines[_INCLUDED.sub("", row.source)] += row.issued
    table = _table("hottest lines of C++", "line", "issued", "share")
    for source, issued in lines.most_common(HOTTEST):
        table.add_row(source, f"{issued:,}", f"{issued / lines.total():.1%}")
    return table


def counters_table(rows: Rows) -> str:
    """The page's table, in Markdown."""
    gpus = list(rows[0]["bounds"])
    lines = [
        "| operator | case | dtype | direction | issued | for 16 bytes | for each mma | mma, least "
        f"| L2 | memory | shared | {' | '.join(gpus)} |",
        "|---" * (11 + len(gpus)) + "|",
    ]
    for row in rows:
        cells = [
            f"{row['per_mma']:.1f}" if row["mma"] else "–",
            f"{row['mma'] / row['least_mma']:.2f}x" if row["least_mma"] else "–",
            f"{row['cache_bytes'] / row['least_bytes']:.2f}x",
            f"{row['memory_bytes'] / row['least_bytes']:.2f}x",
            f"{row['wavefronts'] / max(row['least_wavefronts'], 1):.2f}x",
        ]
        bounds = [f"{row['bounds'][gpu]['us']:,.1f} us, {row['bounds'][gpu]['by']}" for gpu in gpus]
        lines.append(
            f"| `{row['op']}` | {row['case']} | {row['dtype']} | {row['direction']} "
            f"| {row['issued'] / 1e6:,.2f} M | {row['per_16_bytes']:.1f} "
            f"| {' | '.join(cells + bounds)} |"
        )
    return "\n".join([*lines, "", f"{WHAT} Commit {commits(rows)}."]) + "\n"
