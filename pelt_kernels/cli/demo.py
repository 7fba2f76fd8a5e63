"""`pelt-kernels demo`: the main job, as the commands a person would type."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .console import Debug, errors_in_one_line, notes, results
from .signals import signals_handled_by

EXAMPLES = 1000
SHOWN = 5
# The linear probe is what UniPELT is compared with, so it gets the best of three rates.
HEAD_RATES = "1e-3,1e-2,1e-1"


def demo(
    output: Annotated[Path, typer.Option(help="Folder for both runs.")] = Path("runs/demo"),
    train_examples: Annotated[int, typer.Option(min=1)] = EXAMPLES,
    debug: Debug = False,
) -> None:
    """Train UniPELT and a linear probe on the embedded task and model; compare; reload; predict."""
    with errors_in_one_line(debug):
        from ..training.base_model import EMBEDDED, locate
        from ..training.storage import require_writable

        start = time.perf_counter()
        locate(EMBEDDED)  # a missing one is noticed before the folder is made
        require_writable(output)
        common = ("--overwrite", "--train-examples", str(train_examples), *(["--debug"] * debug))
        for method, more in (("head", ("--lr", HEAD_RATES)), ("unipelt", ())):
            folder = str(output / method)
            _run("train", "--method", method, "--output", folder, *common, *more)
        metrics = {
            method: json.loads((output / method / "metrics.json").read_text())
            for method in ("head", "unipelt")
        }
        results().print(_side_by_side(metrics))
        _check_reloaded(output / "unipelt")
        results().print(f"demo: {time.perf_counter() - start:.0f} s in all; results in {output}")


def _run(*arguments: str, **options: Any) -> str:
    """Runs a command in a new process; with ``stdout=PIPE`` returns what it printed."""
    notes().print(f"$ pelt-kernels {' '.join(arguments)}", markup=False, soft_wrap=True)
    command = [sys.executable, "-m", "pelt_kernels.cli", *arguments]
    # A terminal's Ctrl-C would reach both processes. In a session of its own the command gets it
    # from here only, and this process waits while the command writes a checkpoint.
    process = subprocess.Popen(command, text=True, start_new_session=True, **options)
    with signals_handled_by(lambda number, _frame: process.send_signal(number)):
        out, _ = process.communicate()
    if process.returncode:
        raise typer.Exit(process.returncode)  # the command has printed why
    return out or ""


def _side_by_side(metrics: dict[str, dict[str, Any]]) -> Table:
    table = Table("", "linear probe", "UniPELT", title="docstring-match, test part")
    head, unipelt = metrics["head"], metrics["unipelt"]
    for key in ("accuracy", "f1", "matthews", "seconds_per_step", "learning_rate"):
        table.add_row(key.replace("_", " "), f"{head[key]:.3f}", f"{unipelt[key]:.3f}")
    for key in ("trainable_parameters", "stored_parameters", "peak_memory_bytes"):
        table.add_row(key.replace("_", " "), f"{head[key]:,}", f"{unipelt[key]:,}")
    for operator, backend in unipelt["backends"].items():
        table.add_row(operator, head["backends"].get(operator, "-"), backend)
    return table


def _check_reloaded(folder: Path) -> None:
    """Predicts the first tested examples in a new process; RunError unless the labels are the
    same.
    """
    from ..training import RunError
    from ..training.experiment import PREDICTIONS_FILE
    from ..training.storage import replacing

    with (folder / PREDICTIONS_FILE).open(encoding="utf-8") as file:
        before = [json.loads(line) for _, line in zip(range(SHOWN), file, strict=False)]
    sample = folder / "sample.jsonl"
    with replacing(sample) as partial:
        rows = ({key: row[key] for key in ("text", "text_pair", "label")} for row in before)
        partial.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = _run(
        "predict", "--adapter", str(folder / "adapter"), "--file", str(sample), "--json",
        stdout=subprocess.PIPE,
    )  # fmt: skip
    after = [json.loads(line) for line in out.splitlines()]
    table = Table("name", "docstring", "truth", "trained", "reloaded", title="a new process")
    for old, new in zip(before, after, strict=True):
        predicted = (f"{row['predicted']} {row['probability']:.3f}" for row in (old,))
        reloaded = f"{new['label']} {new['probability']:.3f}"
        table.add_row(old["text"], old["text_pair"][:60], old["label"], *predicted, reloaded)
    results().print(table)
    if [row["predicted"] for row in before] != [row["label"] for row in after]:
        raise RunError("demo: the reloaded adapter gives other labels than the trained one")
