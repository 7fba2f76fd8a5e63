"""PEFT's models accelerated against PEFT as shipped, in Markdown, from the rows that
`benchmarks.peft_step` wrote: the short table, and the one of every row.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import geometric_mean
from typing import Any

from .rows import by_processor, measured_by, once

NAMES = {
    "minilm": "MiniLM, 6 layers of 384",
    "bert-base": "BERT-base, 12 of 768",
    "roberta-large": "RoBERTa-large, 24 of 1024",
    "llama": "Llama, 8 of 512",
    "gpt2": "GPT-2, 12 of 768",
    "t5": "T5-small, 6 + 6 of 512",
}
METHODS = {
    "lora-8": "LoRA, r 8",
    "lora-64": "LoRA, r 64",
    "lora-8-all": "LoRA, r 8, all-linear",
    "prefix": "prefix, 30 tokens",
}
KINDS = ("training", "inference")
# The columns of the short table: title, methods, dtype, kind.
COLUMNS = (
    ("LoRA, training step", "lora", "float32", "training"),
    ("LoRA, forward", "lora", "float32", "inference"),
    ("prefix, training step", "prefix", "float32", "training"),
    ("prefix, forward", "prefix", "float32", "inference"),
    ("LoRA, bfloat16 training step", "lora", "bfloat16", "training"),
    ("prefix, bfloat16 training step", "prefix", "bfloat16", "training"),
)
Rows = Sequence[dict[str, Any]]


def headline(rows: Rows) -> str:
    """For each processor a line for each model: the geometric mean over the ranks, the least and
    the most of them.
    """
    return "\n".join(map(_headline, by_processor(rows)))


def _headline(rows: Rows) -> str:
    shown = [column for column in COLUMNS if any(_speedups(rows, column, None))]
    lines = [
        f"| model | {' | '.join(title for title, *_ in shown)} |",
        "|---" * (1 + len(shown)) + "|",
    ]
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = [_mean_and_range(_speedups(rows, column, model)) for column in shown]
        lines.append(f"| {NAMES[model]} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _conditions(rows)]) + "\n"


def full(rows: Rows) -> str:
    """Every row, those of a processor in a table: the median of the rounds' ratios, and the 20th
    and 80th of a hundred of them.
    """
    return "\n".join(map(_full, by_processor(rows)))


def _full(rows: Rows) -> str:
    lines = [
        "| model | method | dtype | training step | PEFT's | forward | PEFT's | memory | load |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        cells = [NAMES[row["model"]], METHODS[row["method"]], row["dtype"]]
        for kind in KINDS:
            speedup, seconds = row[kind]["speedup"], row[kind]["peft_seconds"]
            cells.append("**{median:.2f}x** ({low:.2f}–{high:.2f})".format(**speedup))
            cells.append(f"{1e3 * seconds:,.0f} ms")
        cells.append(f"{row['peak_bytes'] / max(row['peft_peak_bytes'], 1):.2f}x")
        lines.append(f"| {' | '.join(cells)} | {row['load']:.1f} |")
    return "\n".join([*lines, "", _conditions(rows)]) + "\n"


def _speedups(rows: Rows, column: tuple[str, ...], model: str | None) -> list[float]:
    _, method, dtype, kind = column
    return [
        row[kind]["speedup"]["median"]
        for row in rows
        if row["method"].startswith(method)
        and row["dtype"] == dtype
        and model in (None, row["model"])
    ]


def _mean_and_range(speedups: list[float]) -> str:
    if not speedups:
        return "–"
    low, high = f"{min(speedups):.2f}", f"{max(speedups):.2f}"
    shown = f"**{geometric_mean(speedups):.2f}x**"
    return shown if low == high else f"{shown} ({low}–{high})"


def _conditions(rows: Rows) -> str:
    """Texts, machine, versions and commits, each once."""
    versions = "; ".join(
        f"{name} {', '.join(once(row['versions'][name] for row in rows))}"
        for name in ("peft", "transformers")
    )
    sizes = once(f"{row['batch']} texts of up to {row['length']} tokens" for row in rows)
    return f"{', '.join(sizes)}; {versions}; {measured_by(rows)}."
