"""Where a training step and a forward spend their time, for contenders of `benchmarks.efficiency`.

    python -m benchmarks.step_profile [--models bert-base] [--contenders full,lora,peft-lora]
        [--adapters ENVIRONMENT] [--json benchmarks/results/step_profile.jsonl]

Time on the clock by torch's profiler, as shares of full fine-tuning's step, of one contender at a
time: the profiler slows small calls, so a total here is no measurement of a step. `KINDS` says what
belongs together; what is left between torch's operators is autograd, Python and this library's
kernels on a CPU, which are called without torch. The least of `ROUNDS` steps counts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pelt_kernels._hardware import hardware

from . import efficiency, step_models
from .checkout import ROOT, commit
from .peft_tables import NAMES as MODEL_NAMES
from .rows import Rows, by_processor, measured_by, read, write

RESULTS = ROOT / "benchmarks" / "results" / "step_profile.jsonl"
CHOSEN = "full,head,unipelt,adapters-unipelt,lora,peft-lora"
ROUNDS = 2
PRODUCTS, ATTENTION, OTHER, OPTIMIZER, REST = (
    "products", "attention", "other operators", "optimizer", "this library's kernels, Python",
)  # fmt: skip
KINDS = {
    PRODUCTS: ("aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm", "aten::addmv", "aten::mv"),
    ATTENTION: ("aten::_scaled_dot_product", "aten::_softmax", "aten::_flash_attention"),
}
Row = dict[str, Any]


def kinds_of(profile: Row) -> dict[str, float]:
    """Seconds of each kind, which sum up to those on the clock.

    The optimizer calls operators on single elements only, which `OTHER` is without.
    """
    found = dict.fromkeys((*KINDS, OTHER), 0.0)
    for name, seconds in profile["operators"].items():
        if "::" not in name:
            continue  # a name that autograd, the optimizer or the profiler gives a stretch of time
        chosen = (kind for kind, starts in KINDS.items() if name.startswith(starts))
        found[next(chosen, OTHER)] += seconds
    found[OTHER] = max(0.0, found[OTHER] - profile["optimizer"])
    found[OPTIMIZER] = profile["optimizer"]
    return found | {REST: max(0.0, profile["seconds"] - sum(found.values()))}


def measure(model: str, name: str, options: argparse.Namespace) -> Row:
    """A contender's row."""
    row: Row = {"model": model, "contender": name, **efficiency.CONTENDERS[name]._asdict()}
    with efficiency.started(name, model, options) as process:
        for kind in ("training", "inference"):
            profiles = [process.ask("profile", kind) for _ in range(ROUNDS)]
            least = min(profiles, key=lambda profile: profile["seconds"])
            row[kind] = {"seconds": least["seconds"], "kinds": kinds_of(least)}
        row |= {"batch": process.batch, **process.about}
    return row | {
        "length": step_models.MODELS[model].length,
        "hardware": hardware(),
        "commit": commit(),
    }


def table(rows: Rows) -> str:
    """The parts of each contender's step as shares of full fine-tuning's, in Markdown, those of a
    processor in a table.
    """
    return "\n".join(map(_table, by_processor(rows)))


def _table(rows: Rows) -> str:
    kinds = (PRODUCTS, ATTENTION, OTHER, OPTIMIZER, REST)
    lines = [f"| model | who | step | {' | '.join(kinds)} |", "|---" * (3 + len(kinds)) + "|"]
    for row in rows:
        (full,) = (
            r["training"]["seconds"]
            for r in rows
            if r["model"] == row["model"] and r["contender"] == efficiency.BASE
        )
        found = row["training"]
        cells = [MODEL_NAMES[row["model"]], efficiency.efficiency_table.name(row)]
        cells.append(f"{100 * found['seconds'] / full:.0f} %")
        cells += [f"{100 * found['kinds'][kind] / full:.1f} %" for kind in kinds]
        lines.append(f"| {' | '.join(cells)} |")
    first = rows[0]
    lines += [
        "",
        f"Batch {first['batch']} x {first['length']}, float32; {measured_by(rows)}.",
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table, and replaces the rows of this kind of processor with the same model and
    contender in a file.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--models", default="bert-base")
    parser.add_argument("--contenders", default=CHOSEN)
    parser.add_argument("--adapters", type=Path, help="an environment with the library adapters")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args(arguments)
    options.device = "cpu"
    rows: Rows = read(options.json) if options.json and options.json.is_file() else []
    for model in options.models.split(","):
        for name in options.contenders.split(","):
            if efficiency.CONTENDERS[name].library == "adapters" and options.adapters is None:
                continue
            row = measure(model, name, options)
            rows = [r for r in rows if efficiency.key(r) != efficiency.key(row)] + [row]
            if options.json:
                write(options.json, rows)
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
