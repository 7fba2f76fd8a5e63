"""`pelt-kernels train`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from .console import Debug, errors_in_one_line, notes, results

if TYPE_CHECKING:
    from ..training import TrainConfig

RUNS = Path("runs")
METRIC_TITLES = {
    "f1": "F1", "matthews": "Matthews", "spearman": "Spearman", "pearson": "Pearson",
    "f1_micro": "micro F1", "f1_macro": "macro F1",
}  # fmt: skip
_METHODS = (
    "unipelt, unipelt-ap, adapter, prefix, lora, adamix, pst, bitfit, composite, mam, head or full"
)


def train(
    context: typer.Context,
    task: Annotated[
        str | None,
        typer.Option(
            help="A CSV, TSV or JSONL file, docstring-match (the default) or a data set: glue/sst2."
        ),
    ] = None,
    eval: Annotated[
        str | None, typer.Option(help="A file with the test part; else one is held out of --task.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="A hub id or a folder; the default lies in a package.")
    ] = None,
    method: Annotated[str | None, typer.Option(help=f"{_METHODS}.")] = None,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="A field of the method, such as r=4, sparsity=0.5 or adapter.bottleneck=16; "
            "repeat it for more.",
        ),
    ] = None,
    train_examples: Annotated[
        int | None, typer.Option(help="Training examples that each seed draws; default all.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="One run for each, such as 0,1,2.")] = None,
    lr: Annotated[
        str | None, typer.Option(help="Learning rate; of several (1e-3,1e-2) the best on dev.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Default by method, and more for few examples.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Default by method.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens kept of a text; 128.")] = None,
    problem: Annotated[
        str | None,
        typer.Option(
            help="What the labels are: classification, regression (scores) or multi-label (several "
            "a row); found out where it is plain."
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="What decides on dev (best weights, stopping, rate): accuracy, f1 or matthews; "
            "spearman or pearson; f1_micro, f1_macro or accuracy."
        ),
    ] = None,
    class_weights: Annotated[
        str | None,
        typer.Option(help="balanced: all classes weigh the same in the loss, in sum; or none."),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(help="Evaluations on dev without a better score or loss before stopping; 3."),
    ] = None,
    eval_every: Annotated[
        int | None, typer.Option(help="Steps between evaluations; 0: an epoch, but at least 25.")
    ] = None,
    warmup: Annotated[
        float | None, typer.Option(help="Share of the steps with a rising rate; 0.06.")
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help="0.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Default text, sentence, ...")] = None,
    pair_column: Annotated[str | None, typer.Option(help="The second text's column.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Default label.")] = None,
    label_separator: Annotated[
        str | None, typer.Option(help="Between the labels of a row in CSV and TSV; a comma.")
    ] = None,
    no_header: Annotated[
        bool | None,
        typer.Option("--no-header", help="CSV or TSV without names: columns are called 1, 2, ..."),
    ] = None,
    backend: Annotated[str | None, typer.Option(help="Ask every operator for one backend.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for the results; default runs/<task>-<method>.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --output.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Remove the run in --output first.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Train a method on a task, test it, and keep the adapter."""
    with errors_in_one_line(debug):
        from ..training import UsageError

        if resume and overwrite:
            raise UsageError("--resume and --overwrite contradict each other")
        if resume and output is None:
            raise UsageError("--resume needs the --output of the run to go on with")
        chosen = _given_options(context.params)
        _run_experiment(chosen, output, resume, overwrite)


def _run_experiment(
    options: dict[str, Any], output: Path | None, resume: bool, overwrite: bool
) -> None:
    from ..training import TrainConfig, Watchers, stoppable
    from ..training import train as train_experiment
    from ..training.config import continued
    from .progress import progress_bars

    config = continued(output, options) if resume and output else TrainConfig(**options).resolved()
    folder = output or _free_folder(config)
    console = notes()

    def say(sentence: str) -> None:
        console.print(sentence, markup=False, soft_wrap=True)

    with stoppable(say) as stop, progress_bars(console) as bars:
        watchers = Watchers(say=say, progress=bars, stop=stop)
        metrics = train_experiment(
            config, folder, resume=resume, overwrite=overwrite, watchers=watchers
        )
    results().print(_table(metrics))
    results().print(f"adapter, metrics.json and plots: {folder}", markup=False)


def _given_options(parameters: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config that stand on the command line."""
    from ..training.config import option_names

    values = {name: parameters[name] for name in option_names()}
    options = {name: value for name, value in values.items() if value not in (None, [])}
    if "seeds" in options:
        options["seeds"] = _numbers("seeds", options["seeds"], int)
    if "lr" in options:
        options["lr"] = _numbers("lr", options["lr"], float)
    return options


def _numbers(option: str, text: str, kind: type[int] | type[float]) -> tuple[Any, ...]:
    from ..training import UsageError

    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{option}: expected numbers such as 0,1,2, got '{text}'") from error


def _free_folder(config: TrainConfig) -> Path:
    """``runs/<task>-<method>``, numbered where a run is there already."""
    from ..training import is_run

    name = f"{Path(config.task).stem}-{config.method}"
    folder, number = RUNS / name, 2
    while is_run(folder):
        folder, number = RUNS / f"{name}-{number}", number + 1
    return folder


def _table(metrics: dict[str, Any]) -> Table:
    table = Table(title=f"{metrics['method']} on {metrics['task']['name']}", show_header=False)
    seeds = len(metrics["seeds"])
    for key, spread in metrics["summary"].items():
        deviation = f" ± {spread['std']:.3f} over {seeds} seeds" if seeds > 1 else ""
        table.add_row(f"test {METRIC_TITLES.get(key, key)}", f"{spread['mean']:.3f}{deviation}")
    trained, total = metrics["trainable_parameters"], metrics["total_parameters"]
    table.add_row("trainable parameters", f"{trained:,} ({100 * trained / total:.2g} % of all)")
    table.add_row("learning rate", f"{metrics['learning_rate']:g}")
    seconds = metrics["seconds_per_step"]
    table.add_row("seconds per step", "not timed" if seconds is None else f"{seconds:.3f}")
    table.add_row("peak memory", f"{metrics['peak_memory_bytes'] / 2**20:,.0f} MiB")
    for operator, backend in metrics["backends"].items():
        table.add_row(operator, backend)
    return table
