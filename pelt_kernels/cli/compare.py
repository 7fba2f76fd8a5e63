"""`pelt-kernels compare`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from . import compare_options as given
from .console import Debug, errors_in_one_line, notes, results

if TYPE_CHECKING:
    from ..training.compare import Source


def compare(
    tasks: given.Tasks = None,
    evals: given.Evals = None,
    methods: given.Methods = None,
    train_examples: given.TrainExamples = None,
    seeds: given.Seeds = None,
    data_seed: given.DataSeed = None,
    dev_examples: given.DevExamples = None,
    lr: given.Lr = None,
    lr_factors: given.LrFactors = None,
    metrics: given.Metrics = None,
    model: given.Model = None,
    epochs: given.Epochs = None,
    batch_size: given.BatchSize = None,
    max_length: given.MaxLength = None,
    patience: given.Patience = None,
    eval_every: given.EvalEvery = None,
    warmup: given.Warmup = None,
    weight_decay: given.WeightDecay = None,
    backend: given.Backend = None,
    device: given.Device = None,
    precision: given.Precision = None,
    jobs: given.Jobs = None,
    output: given.Output = Path("runs/compare"),
    wait: given.Wait = False,
    debug: Debug = False,
) -> None:
    """Train methods on tasks with few and many examples, and tell what is more than chance.

    The same command goes on where it was stopped.
    """
    with errors_in_one_line(debug):
        from ..training import Watchers, stoppable
        from ..training.compare import Comparison
        from ..training.compare import compare as run_comparison
        from ..training.compare.protocol import named, numbers, with_changes
        from ..training.compare.tables import conditions, tables

        values: dict[str, Any] = {
            "data_seed": data_seed, "dev_examples": dev_examples, "model": model, "epochs": epochs,
            "batch_size": batch_size, "max_length": max_length, "patience": patience,
            "eval_every": eval_every, "warmup": warmup, "weight_decay": weight_decay,
            "backend": backend, "device": device, "precision": precision,
            "tasks": _sources(tasks, evals) if tasks or evals else None,
            "methods": None if methods is None else methods.split(","),
            "train_examples": None if train_examples is None else _sizes(train_examples),
            "seeds": None if seeds is None else numbers("seeds", seeds, int),
            "lr_factors": None if lr_factors is None else numbers("lr-factors", lr_factors, float),
            "metrics": named("metric", metrics) if metrics else None,
            "lr": {k: numbers("lr", v, float) for k, v in named("lr", lr).items()} if lr else None,
        }  # fmt: skip
        comparison = with_changes(
            Comparison(), {name: value for name, value in values.items() if value is not None}
        )
        console = notes()

        def say(sentence: str) -> None:
            console.print(sentence, markup=False, soft_wrap=True)

        with stoppable(say) as stop:
            summary = run_comparison(
                comparison, output, jobs=jobs, wait=wait, watchers=Watchers(say=say, stop=stop)
            )
        for each in tables(summary):
            table = Table(*each.columns, title=each.title)
            for row in each.rows:
                table.add_row(*row)
            results().print(table)
        results().print(conditions(summary), markup=False)
        results().print(f"results.jsonl, compare.json, .md and .png: {output}", markup=False)


def _sources(tasks: list[str] | None, evals: list[str] | None) -> tuple[Source, ...]:
    """The tasks with their names and test files. Raises UsageError."""
    from ..training import UsageError
    from ..training.compare import Source

    found = []
    tests: list[str | None] = [None] * len(tasks or []) if evals is None else [*evals]
    if len(tests) != len(tasks or []):
        raise UsageError(
            f"eval: expected a test file for each --task, in their order, or none, got "
            f"{len(tests)} for {len(tasks or [])}; 'none' holds rows of that task out"
        )
    for text, test in zip(tasks or [], tests, strict=True):
        name, equals, task = text.partition("=")
        if not equals:
            path = Path(text)
            name, task = (path.stem if path.suffix else text), text
        found.append(Source(name, task, None if test == "none" else test))
    return tuple(found)


def _sizes(text: str) -> tuple[int | None, ...]:
    from ..training.compare.protocol import numbers

    return tuple(
        None if part.strip() == "all" else numbers("train-examples", part, int)[0]
        for part in text.split(",")
    )
