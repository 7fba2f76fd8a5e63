"""Every method on a task, 3 seeds each, into benchmarks/results and its page.

    python -m benchmarks.methods_table [--methods unipelt,head] [--runs FOLDER]
    python -m benchmarks.methods_table --name sst2 --train-examples 200
        --task sst2/train.tsv --eval sst2/dev.tsv

Without a task it is the embedded one. `--metric matthews` chooses on the development part by
another score than accuracy, and the table shows it. For AdaMix the table also tells what one random
expert of each module reaches instead of the average. Finished rows are read and unfinished
runs resumed, so the command can be stopped and started again. A table holds the finished methods.
Scores are comparable only where every row comes from one commit, so each row carries its own;
remove the folder of runs to measure anew.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pelt_kernels.training.metrics import NAMES, score

from . import readme
from .checkout import commit
from .rows import read, write
from .training_runs import trained

EXAMPLES = 1000
SEEDS = "0,1,2"
METHODS = ("unipelt", "unipelt-ap", "adapter", "prefix", "lora", "bitfit", "head", "full")
# On files: the methods and variants by the name of their row, with the command's options.
VARIANTS: dict[str, Sequence[str]] = {
    "adamix-lora": ("--method", "adamix", "--set", "kind=lora"),
    "pst-50": ("--method", "pst", "--set", "sparsity=0.5"),
    "pst-90": ("--method", "pst", "--set", "sparsity=0.9"),
}
ON_FILES = (
    "head", "bitfit", "lora", "adapter", "prefix", "unipelt", "mam", "adamix", "adamix-lora",
    "pst-50", "pst-90", "full",
)  # fmt: skip
RANDOM_EXPERTS = 5  # draws, each of one expert for every module
# The linear probe is what the others are measured against, so it gets its best rate on dev.
MORE: dict[str, Sequence[str]] = {"head": ("--lr", "1e-3,1e-2,1e-1")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains what is not trained yet, and writes the table after each method."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--methods", help="rows in the order to train them; default all")
    parser.add_argument("--task", type=Path, help="a file with the training part")
    parser.add_argument("--eval", type=Path, help="a file with the test part")
    parser.add_argument("--name", help="of the task in the table; default the file's folder")
    parser.add_argument("--train-examples", type=int, default=EXAMPLES)
    parser.add_argument("--seeds", default=SEEDS)
    parser.add_argument("--metric", choices=NAMES, default="accuracy")
    parser.add_argument("--model", help="default the embedded one")
    parser.add_argument("--runs", type=Path, help="default runs/methods or runs/methods-<name>")
    options = parser.parse_args(arguments)
    absent = [path for path in (options.task, options.eval) if path and not path.is_file()]
    if absent:
        print(f"methods_table: skipped, {absent[0]} is not there", file=sys.stderr)
        return 0
    name = None if options.task is None else options.name or options.task.resolve().parent.name
    runs = options.runs or Path("runs") / ("methods" if name is None else f"methods-{name}")
    known = METHODS if name is None else ON_FILES
    common = ["--train-examples", str(options.train_examples), "--seeds", options.seeds]
    common += ["--metric", options.metric]
    for option in ("task", "eval", "model"):
        value = getattr(options, option)
        common += [] if value is None else [f"--{option}", str(value)]
    for row in options.methods.split(",") if options.methods else known:
        code = _train_row(row, runs / row, common)
        if code:
            return code  # the command has printed why
        _write(runs, known, name)
    return 0


def _train_row(row: str, folder: Path, common: Sequence[str]) -> int:
    if (folder / "commit").is_file():
        return 0
    method = VARIANTS.get(row, ("--method", row))
    code = trained(folder, [*method, *common, *MORE.get(row, ())])
    if code:
        return code
    if row.startswith("adamix"):
        scores = _random_experts(folder)
        (folder / "random_experts.json").write_text(json.dumps(scores) + "\n")
    (folder / "commit").write_text(commit())
    return 0


def _random_experts(folder: Path) -> list[float]:
    """The scores on test of the kept adapter with one random expert for each of its modules in the
    place of their average.
    """
    import numpy as np
    import torch

    from pelt_kernels.nn import Bank
    from pelt_kernels.training import Predictor, load_task
    from pelt_kernels.training.config import load_config

    config = load_config(folder)
    task = load_task(config.task, config.eval, config.columns)
    truth = [task.labels.index(example.label or "") for example in task.test]
    generator = torch.Generator().manual_seed(0)
    results = []
    for _ in range(RANDOM_EXPERTS):
        predictor = Predictor(folder / "adapter", config.model)
        for bank in (m for m in predictor.model.modules() if isinstance(m, Bank)):
            for side in bank.SIDES:
                experts = len(getattr(bank, side[0]))
                drawn = int(torch.randint(experts, (), generator=generator))
                for name in side:
                    member = getattr(bank, name)[drawn : drawn + 1]
                    setattr(bank, name, torch.nn.Parameter(member.clone(), requires_grad=False))
        predicted = [task.labels.index(row.label) for row in predictor(task.test).rows]
        scores = score(np.array(predicted), np.array(truth), len(task.labels))
        results.append(scores[config.metric])
    return results


def _write(runs: Path, known: Sequence[str], name: str | None) -> None:
    """The rows that are finished, into the file of their task. A row that is there already stays
    until its method is finished again, if it was measured on as many examples by the same metric.
    """
    fresh = {r: _row(runs / r) | {"row": r} for r in known if (runs / r / "commit").is_file()}
    readme.METHODS.parent.mkdir(exist_ok=True)
    path = readme.METHODS if name is None else readme.task_file(name)
    measured = {_conditions(row) for row in fresh.values()}
    stay = [row for row in read(path) if _conditions(row) in measured] if path.is_file() else []
    rows = {row["row"]: row for row in stay} | fresh
    write(path, [rows[r] for r in known if r in rows])
    readme.main()


def _conditions(row: dict[str, Any]) -> tuple[int, str]:
    """What rows of one table have in common."""
    return row["train_examples"], row["metric"]


def _row(folder: Path) -> dict[str, Any]:
    metrics = json.loads((folder / "metrics.json").read_text())
    experts = folder / "random_experts.json"
    task, metric = metrics["task"], metrics["config"]["metric"]
    return {
        "method": metrics["method"],
        "metric": metric,
        **metrics["summary"],
        "seeds": [
            {
                key: run[key]
                for key in ("seed", metric, f"dev_{metric}", "best_step", "steps", "notes")
            }
            for run in metrics["seeds"]
        ],
        **{
            key: metrics[key]
            for key in (
                "learning_rate", "trainable_parameters", "total_parameters", "seconds_per_step",
                "peak_memory_bytes", "backends", "hardware", "torch", "adapter_seed",
            )
        },
        "stored_parameters": metrics.get("stored_parameters"),
        "task": task["name"],
        "task_fingerprint": task["fingerprint"],
        "train_examples": task["examples"]["train"],
        "test_examples": task["examples"]["test"],
        "random_experts": json.loads(experts.read_text()) if experts.is_file() else [],
        "commit": (folder / "commit").read_text(),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
