"""`pelt-kernels train`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from . import train_options as given
from .console import Debug, errors_in_one_line, notes, results

if TYPE_CHECKING:
    from ..training import TrainConfig

RUNS = Path("runs")
METRIC_TITLES = {
    "f1": "F1", "matthews": "Matthews", "spearman": "Spearman", "pearson": "Pearson",
    "f1_micro": "micro F1", "f1_macro": "macro F1",
    "bleu": "BLEU", "chrf": "chrF", "rouge_l": "ROUGE-L",
}  # fmt: skip


def train(
    context: typer.Context,
    tasks: given.Tasks = None,
    evals: given.Evals = None,
    model: given.Model = None,
    method: given.Method = None,
    options: given.Options = None,
    train_examples: given.TrainExamples = None,
    seeds: given.Seeds = None,
    lr: given.Lr = None,
    epochs: given.Epochs = None,
    batch_size: given.BatchSize = None,
    max_length: given.MaxLength = None,
    problem: given.Problem = None,
    metric: given.Metric = None,
    class_weights: given.ClassWeights = None,
    patience: given.Patience = None,
    eval_every: given.EvalEvery = None,
    warmup: given.Warmup = None,
    weight_decay: given.WeightDecay = None,
    text_column: given.TextColumn = None,
    pair_column: given.PairColumn = None,
    label_column: given.LabelColumn = None,
    label_separator: given.LabelSeparator = None,
    source_column: given.SourceColumn = None,
    target_column: given.TargetColumn = None,
    attribute_columns: given.AttributeColumns = None,
    task_column: given.TaskColumn = None,
    max_target_length: given.MaxTargetLength = None,
    beams: given.Beams = None,
    no_header: given.NoHeader = None,
    backend: given.Backend = None,
    device: given.Device = None,
    precision: given.Precision = None,
    output: given.Output = None,
    resume: given.Resume = False,
    overwrite: given.Overwrite = False,
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

    values = {name: parameters.get(name) for name in option_names()}
    for name in ("task", "eval"):
        first, *more = parameters[f"{name}s"] or [None]
        values |= {name: first, f"more_{name}s": more}
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

    stems = [Path(task).stem for task in (config.task, *config.more_tasks)]
    name = f"{'+'.join(stems)}-{config.method}"
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
