"""What UniPELT's gates do and what they are worth, of real runs, into benchmarks/results and its
page.

    python -m benchmarks.gates --data ../shared/data [--tasks sst2,trec] [--seeds 0,1,2]
                               [--variants ungated,unipelt] [--runs runs/gates]

Each run is `pelt-kernels train`, in a folder of its own, `<task>/<variant>-seed<seed>`; each with
gates gets the report of `pelt-kernels gates` on the test part, beside the run without gates of the
same seed where there is one. Variants are ``unipelt``, ``ungated``, and ``entropy-0.01`` or
``l1-0.01`` with a penalty of that kind and weight. Finished runs are read and unfinished ones
resumed, so the command can be stopped and started again; it needs each task's train.tsv, and its
dev.tsv, else test.tsv, to test on. A row takes the place of an older one of the same task, variant
and seed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pelt_kernels.training.gate_report.ablation import ALL, PARTS, REMOVED, UNGATED
from pelt_kernels.training.gate_report.report import NUMBERS_FILE as REPORT

from . import gates_table, readme, training_runs
from .checkout import commit
from .gates_table import GATED
from .rows import read, write

TRAINED, REPORTED = "commit", "gates-commit"  # files with the commit that did it
WITHOUT = "ungated"
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Does what is not done yet, and writes the rows after each report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="has a folder for each task")
    parser.add_argument("--tasks", default="sst2,trec")
    parser.add_argument("--variants", default=f"{WITHOUT},{GATED}")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--train-examples", type=int, default=500)
    parser.add_argument("--eval-every", type=int, default=100)
    parser.add_argument("--model", help="default the embedded one")
    parser.add_argument("--runs", type=Path, default=Path("runs/gates"))
    options = parser.parse_args(arguments)
    # A run without gates before the one with, whose report is beside it.
    for seed in options.seeds.split(","):
        for task in options.tasks.split(","):
            for variant in options.variants.split(","):
                folder = options.runs / task / f"{variant}-seed{seed}"
                given = [*files(options.data / task), "--seeds", seed]
                given += ["--train-examples", str(options.train_examples)]
                given += ["--eval-every", str(options.eval_every)]
                given += [] if options.model is None else ["--model", options.model]
                code = _train(folder, [*given, *method_of(variant)])
                if code == 0 and variant != WITHOUT:
                    twin = folder.with_name(f"{WITHOUT}-seed{seed}")
                    code = _report(folder, twin if (twin / TRAINED).is_file() else None)
                if code:
                    return code  # the command has printed why
                _write(options.runs)
    return 0


def files(folder: Path) -> list[str]:
    """The command's options for a task's folder. Raises SystemExit where there is none."""
    train = folder / "train.tsv"
    tested = [path for name in ("dev.tsv", "test.tsv") if (path := folder / name).is_file()]
    if not train.is_file() or not tested:
        raise SystemExit(f"gates: expected train.tsv, and dev.tsv or test.tsv, in {folder}")
    return ["--task", str(train), "--eval", str(tested[0])]


def method_of(variant: str) -> list[str]:
    """The command's options for a variant. Raises SystemExit for an unknown one."""
    options = ["--method", "unipelt"]
    if variant == GATED:
        return options
    if variant == WITHOUT:
        return options + [word for part in PARTS for word in ("--set", f"{part}.gated=false")]
    kind, _, weight = variant.partition("-")
    if kind not in ("entropy", "l1") or not weight:
        raise SystemExit(
            f"gates: expected a variant {GATED}, {WITHOUT}, or such as entropy-0.01 or l1-0.01, "
            f"got {variant!r}"
        )
    return [*options, "--set", f"gate_penalty={weight}", "--set", f"gate_penalty_kind={kind}"]


def _train(folder: Path, options: Sequence[str]) -> int:
    if (folder / TRAINED).is_file():
        return 0
    code = training_runs.trained(folder, options)
    if code == 0:
        (folder / TRAINED).write_text(commit())
    return code


def _report(folder: Path, ungated: Path | None) -> int:
    done = folder / REPORTED
    if done.is_file() and (ungated is None or has_twin(json.loads((folder / REPORT).read_text()))):
        return 0
    beside = [] if ungated is None else ["--ungated", str(ungated)]
    code = training_runs.command("gates", str(folder), *beside)
    if code == 0:
        done.write_text(commit())
    return code


def has_twin(report: Row) -> bool:
    """Whether a report has a run without gates to compare with."""
    return any(row["change"] == UNGATED for row in report["ablation"]["rows"])


def _write(runs: Path) -> None:
    """The rows of all finished reports of a folder of runs, beside the others that are there."""
    fresh = [row_of(done.parent) for done in sorted(runs.glob(f"*/*/{REPORTED}"))]
    replaced = {_name(row) for row in fresh}
    old = read(gates_table.RESULTS) if gates_table.RESULTS.is_file() else []
    rows = [*(row for row in old if _name(row) not in replaced), *fresh]
    if rows:
        write(gates_table.RESULTS, sorted(rows, key=_name))
        readme.main()


def _name(row: Row) -> tuple[str, str, int]:
    return row["task"], row["variant"], row["seed"]


def row_of(folder: Path) -> Row:
    """A run's row: of its report what stands in tables."""
    variant, _, seed = folder.name.rpartition("-seed")
    report = json.loads((folder / REPORT).read_text())
    run = json.loads((folder / "metrics.json").read_text())
    ablation = report["ablation"]
    return {
        "task": folder.parent.name,
        "variant": variant,
        "seed": int(seed),
        "metric": report["metric"],
        "score": ablation["score"],
        "loss": ablation["loss"],
        "train_examples": run["task"]["examples"]["train"],
        "test_examples": sum(report["rows"].values()),
        "gates": [
            {name: gate[name] for name in ("layer", "kind", "mean", "std")}
            for gate in report["gates"]
        ],
        "variance": report["variance"],
        "relations": report["relations"],
        "changes": [
            row for row in ablation["rows"] if row["of"] == ALL or row["change"] == REMOVED
        ],
        "headline": report["findings"]["headline"],
        "hardware": report["hardware"],
        "versions": report["versions"],
        "commit": (folder / TRAINED).read_text(),
    }


if __name__ == "__main__":
    sys.exit(main())
