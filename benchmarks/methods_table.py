"""Every method on the embedded task, 3 seeds each, into benchmarks/results and the README's table.

    python -m benchmarks.methods_table [--methods unipelt,head] [--runs FOLDER]

What is finished is read, what was begun goes on, so that it can be stopped and started again. The
table holds the methods that are finished. Accuracies are comparable only where every row comes from
one commit, so each row carries its own; remove the folder of runs to measure anew.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import readme

EXAMPLES = 1000
SEEDS = "0,1,2"
METHODS = ("unipelt", "unipelt-ap", "adapter", "prefix", "lora", "bitfit", "head", "full")
# The linear probe is what the others are measured against, so it gets its best rate on dev.
MORE: dict[str, Sequence[str]] = {"head": ("--lr", "1e-3,1e-2,1e-1")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains what is not trained yet, and writes the table after each method."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", default=",".join(METHODS), help="in the order to train them")
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"))
    options = parser.parse_args(arguments)
    for method in options.methods.split(","):
        code = _train(method, options.runs / method)
        if code:
            return code  # the command has said why
        _write(options.runs)
    return 0


def _train(method: str, folder: Path) -> int:
    if (folder / "metrics.json").is_file():
        return 0
    common = ["--method", method, "--train-examples", str(EXAMPLES), "--seeds", SEEDS]
    begun = ["--resume"] if (folder / "run.json").is_file() else []
    command = [sys.executable, "-m", "pelt_kernels.cli", "train", "--output", str(folder)]
    code = subprocess.run(
        [*command, *common, *MORE.get(method, ()), *begun], check=False
    ).returncode
    if not code:
        (folder / "commit").write_text(_commit())
    return code


def _commit() -> str:
    git = ["git", "-C", str(readme.ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], text=True, capture_output=True, check=True)
    return commit.stdout.strip()


def _write(runs: Path) -> None:
    rows = [_row(runs / method) for method in METHODS if (runs / method / "commit").is_file()]
    readme.METHODS.parent.mkdir(exist_ok=True)
    readme.METHODS.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
    if readme.README.is_file():
        readme.main()


def _row(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "metrics.json").read_text())
    task = found["task"]
    return {
        "method": found["method"],
        **found["summary"],
        "seeds": [
            {key: run[key] for key in ("seed", "accuracy", "dev_accuracy", "best_step", "steps")}
            for run in found["seeds"]
        ],
        **{
            key: found[key]
            for key in (
                "learning_rate", "trainable_parameters", "total_parameters", "seconds_per_step",
                "peak_memory_bytes", "backends", "hardware", "torch",
            )
        },
        "task": task["name"],
        "task_fingerprint": task["fingerprint"],
        "train_examples": task["examples"]["train"],
        "test_examples": task["examples"]["test"],
        "commit": (folder / "commit").read_text(),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
