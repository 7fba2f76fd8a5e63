"""How fast the operators are, in Markdown, from the rows that `benchmarks.run` wrote: the
short table, and the one of everything beside the rows.

A row's speedup is a baseline's time over a backend's, a table has the geometric mean over the
cases. Rows of different kinds of processors are never put together.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import geometric_mean
from typing import Any

# What people use instead of this package; everything else is in the full table.
HEADLINE = ("plain", "PEFT")
MOST_LINES = 15  # of the short table
Rows = Sequence[dict[str, Any]]


def headline(rows: Rows) -> str:
    """What the dispatch chooses against what people write and against peers: a line for each
    operator, baseline and processor.
    """
    columns = list(dict.fromkeys((row["dtype"], row["direction"]) for row in rows))
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["baseline"] in HEADLINE and row.get("is_default", True):
            groups.setdefault((row["op"], row["baseline"], row["kind"]), []).append(row)
    # What has no room is left out from the end: peers first, `plain` of the first operators last.
    order = list(dict.fromkeys(row["op"] for row in rows))
    by_rank = sorted(groups, key=lambda key: (HEADLINE.index(key[1]), order.index(key[0])))
    shown = sorted(by_rank[:MOST_LINES], key=lambda key: (order.index(key[0]), key[1] != "plain"))
    lines = [
        f"| operator | against | processor | {' | '.join(' '.join(c) for c in columns)} |",
        "|---" * (3 + len(columns)) + "|",
    ]
    for operator, baseline, kind in shown:
        cells = []
        for column in columns:
            speedups = [
                row["speedup"]
                for row in groups[operator, baseline, kind]
                if (row["dtype"], row["direction"]) == column
            ]
            cells.append(_mean_and_range(speedups) if speedups else "–")
        lines.append(f"| `{operator}` | {baseline} | {kind} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_conditions(rows)]) + "\n"


def full(rows: Rows) -> str:
    """Every backend against every baseline: the mean, the least and the most speedup, and the share
    of the baseline's peak memory.
    """
    lines = [
        "| operator | dtype | direction | backend | against | processor | speedup | least | most "
        "| memory |",
        "|---" * 10 + "|",
    ]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    order = list(dict.fromkeys(row["op"] for row in rows))
    for row in sorted(rows, key=lambda row: order.index(row["op"])):
        key = tuple(row[k] for k in ("op", "dtype", "direction", "backend", "baseline", "kind"))
        groups.setdefault(key, []).append(row)
    for (operator, *words), group in groups.items():
        speedups = [row["speedup"] for row in group]
        memory = [row["peak_bytes"] / max(row["baseline_peak_bytes"], 1) for row in group]
        lines.append(
            f"| `{operator}` | {' | '.join(words)} | **{geometric_mean(speedups):.2f}x** "
            f"| {min(speedups):.2f}x | {max(speedups):.2f}x | {_mean_of_shares(memory)} |"
        )
    return "\n".join([*lines, "", *_conditions(rows)]) + "\n"


def _mean_and_range(speedups: list[float]) -> str:
    low, high = f"{min(speedups):.2f}", f"{max(speedups):.2f}"
    shown = f"**{geometric_mean(speedups):.2f}x**"
    return shown if low == high else f"{shown} ({low}–{high})"


def _mean_of_shares(shares: list[float]) -> str:
    """A call that allocates nothing has the share 0, of which there is no geometric mean."""
    return f"{geometric_mean(shares):.2f}x" if all(shares) else "0"


def _conditions(rows: Rows) -> list[str]:
    """A line for each kind of processor: its name, threads, the version of torch, the commits."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kinds.setdefault(row["kind"], []).append(row)
    lines = []
    for kind, group in kinds.items():
        machines, versions, commits = (
            ", ".join(dict.fromkeys(row[key][:length] for row in group))
            for key, length in (("hardware", None), ("torch", None), ("commit", 10))
        )
        lines.append(f"{kind}: {machines}; torch {versions}; commit {commits}.  ")
    return lines
