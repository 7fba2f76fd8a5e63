"""What `benchmarks.gates` found, as tables: what the gates are worth, and what they follow."""

from __future__ import annotations

from statistics import mean
from typing import Any

from pelt_kernels.training.gate_report.ablation import (
    ALL,
    CONSTANTS,
    OWN_MEAN,
    PARTS,
    REMOVED,
    SHUFFLED,
    UNGATED,
)
from pelt_kernels.training.gate_report.findings import (
    kind_mean,
    kinds_of,
    points,
    typical_spread,
    words,
)

from .checkout import ROOT
from .rows import Rows, measured_by, once

RESULTS = ROOT / "benchmarks" / "results" / "gates.jsonl"
GATED = "unipelt"  # the variant that is the method as it is
TITLES = {
    OWN_MEAN: "every gate held at its own mean",
    SHUFFLED: "every text with the gates of another",
    **{name: f"all gates {name}" for name in reversed(CONSTANTS)},
}
Row = dict[str, Any]


def worth(rows: Rows) -> str:
    """What changes of the gates do to accuracy on each task, in Markdown."""
    by_task = _by_task([row for row in rows if row["variant"] == GATED])
    lines = [
        f"| | {' | '.join(f'{task}, {_seeds(found)}' for task, found in by_task.items())} |",
        "|---" * (1 + len(by_task)) + "|",
    ]
    as_trained = [_score(found) for found in by_task.values()]
    lines.append(f"| as trained | {' | '.join(as_trained)} |")
    changes = [(ALL, change, title) for change, title in TITLES.items()]
    changes += [(part, REMOVED, f"without {_the(part)}") for part in PARTS]
    changes.append((ALL, UNGATED, "trained without gates"))
    for of, change, title in changes:
        cells = [_change(found, of, change) for found in by_task.values()]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", _conditions([row for found in by_task.values() for row in found])]
    return "\n".join(lines) + "\n"


def followed(rows: Rows) -> str:
    """The gates themselves and what they relate to, in Markdown: a line for each run."""
    lines = [
        "| task | run | seed | accuracy | mean gates | between texts | label | length | loss "
        "| confidence |",
        "|---" * 10 + "|",
    ]
    for row in rows:
        means = (f"{words(kind)} {kind_mean(row, kind):.2f}" for kind in kinds_of(row))
        cells = [row["task"], f"`{row['variant']}`", str(row["seed"]), f"{row['score']:.3f}"]
        cells += [", ".join(means), f"± {typical_spread(row):.3f}"]
        for trait in ("label", "length", "loss", "confidence"):
            found = row["relations"]["traits"][trait]
            strongest = found["strongest"]["value"]
            cells.append(f"{found['found']}, {strongest:.2f}".replace("-", "−"))
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", _conditions(rows)]
    return "\n".join(lines) + "\n"


def _by_task(rows: Rows) -> dict[str, Rows]:
    return {
        task: [row for row in rows if row["task"] == task]
        for task in dict.fromkeys(row["task"] for row in rows)
    }


def _seeds(rows: Rows) -> str:
    return f"{len(rows)} seeds" if len(rows) > 1 else "one seed"


def _score(rows: Rows) -> str:
    scores = [100 * row["score"] for row in rows]
    spread = f" ({min(scores):.1f} to {max(scores):.1f})" if len(scores) > 1 else ""
    return f"{mean(scores):.1f}{spread}"


def _change(rows: Rows, of: str, change: str) -> str:
    """The mean difference of the seeds, its range, and in how many of them it is an effect."""
    found = [
        entry
        for row in rows
        for entry in row["changes"]
        if entry["of"] == of and entry["change"] == change
    ]
    if not found:
        return "–"
    values = [entry["difference"]["value"] for entry in found]
    shown = sum(entry["difference"]["is_effect"] for entry in found)
    notes = [f"{points(min(values))} to {points(max(values))}"] if len(values) > 1 else []
    notes += [f"shown in {shown} of {len(found)}"] if shown else []
    return points(mean(values)) + (f" ({', '.join(notes)})" if notes else "")


def _the(part: str) -> str:
    return "LoRA" if part == "lora" else f"the {part}"


def _conditions(rows: Rows) -> str:
    """The sentence below a table."""
    sizes = once(
        f"{row['train_examples']:,} training and {row['test_examples']:,} test examples "
        f"({row['task']})"
        for row in rows
    )
    return f"{', '.join(sizes)}; {measured_by(rows)}."
