"""`pelt-kernels compare`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from . import compare_options as given
from .console import Debug, errors_in_one_line, notes, results

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..training.compare import Comparison, Source


def compare(
    tasks: given.Tasks = None,
    evals: given.Evals = None,
    preset: given.Preset = None,
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
    report: given.Report = False,
    wait: given.Wait = False,
    debug: Debug = False,
) -> None:
    """Train methods on tasks with few and many examples, and tell what is more than chance.

    The same command goes on where it was stopped; --report shows what is finished meanwhile.
    """
    with errors_in_one_line(debug):
        from ..training import Watchers, stoppable
        from ..training import compare as comparing
        from ..training.compare.protocol import named, with_changes
        from ..training.config import numbers

        console = notes()

        def say(sentence: str) -> None:
            console.print(sentence, markup=False, soft_wrap=True)

        if report:
            _show(comparing.report(output, watchers=Watchers(say=say)), output)
            return
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
        plain = _of_preset(preset, values["tasks"])
        if values["metrics"] is not None:
            values["metrics"] = {**plain.metrics, **values["metrics"]}
        comparison = with_changes(plain, {k: v for k, v in values.items() if v is not None})
        with stoppable(say) as stop:
            watchers = Watchers(say=say, stop=stop)
            summary = comparing.compare(comparison, output, jobs=jobs, wait=wait, watchers=watchers)
        _show(summary, output)


def _of_preset(name: str | None, tasks: Sequence[Source] | None) -> Comparison:
    """The paper's protocol, or the defaults."""
    from ..training.compare import Comparison
    from ..training.compare.presets import preset
    from ..training.compare.protocol import with_changes

    plain = Comparison()
    return plain if name is None else with_changes(plain, preset(name, tasks or plain.tasks))


def _show(summary: dict[str, Any], output: Path) -> None:
    from ..training.compare.tables import conditions, tables

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
    from ..training.config import numbers

    return tuple(
        None if part.strip() == "all" else numbers("train-examples", part, int)[0]
        for part in text.split(",")
    )
