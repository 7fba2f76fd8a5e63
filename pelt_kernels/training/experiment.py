"""An experiment from one config: choose a learning rate on dev, train each seed, test once."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..models import get_pelt_model
from ..ops import use_backend
from . import processes
from .base_model import locate
from .config import FILE as CONFIG_FILE
from .config import TrainConfig, for_problem, save_config
from .errors import RunError, UsageError, reason
from .experiment_run import Run, Watchers, rate_name
from .lengths import with_lengths
from .machine import check_environment, computing_device
from .plots import draw_curves, draw_gates
from .predictor import Predictor
from .problems import PROBLEMS
from .recipes import recipe
from .records import read_record
from .report import metrics
from .stopping import rank
from .storage import claimed, clear_partial, replacing, require_writable, write_json
from .tasks import Task, labels_in, load_task
from .tasks.examples import shortened
from .trackers import check_trackers

METRICS_FILE = "metrics.json"
TASK_FILE = "data.json"
PREDICTIONS_FILE = "test_predictions.jsonl"
ADAPTER_FOLDER = "adapter"
GATE_FILES = ("gates.json", "gates.html", "gates.csv")  # a report on the adapter's gates
_OWN_FILES = (
    CONFIG_FILE, METRICS_FILE, TASK_FILE, PREDICTIONS_FILE, "curves.png", "gates.png", *GATE_FILES,
)  # fmt: skip


def train(
    config: TrainConfig,
    output: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    wait: bool = False,
    watchers: Watchers | None = None,
) -> dict[str, Any]:
    """Trains and tests; returns what `metrics.json` holds.

    `output` then holds ``metrics.json``, ``adapter/`` (of the seed that is best on dev),
    ``curves.png``, ``gates.png`` where the method has gates, ``test_predictions.jsonl`` and a
    folder for each run. With `resume`, finished runs are read, and the unfinished one goes on from
    its last checkpoint and reaches the weights it would have reached without a break. With
    `overwrite`, an existing run is removed once everything else has been checked. One experiment at
    a time writes in a folder; its lock ends with the process. A second one is refused at once, or
    with `wait` begins after it.

    Processes that a distributed launcher has started train together: each of them calls this, the
    main one's arguments hold and only its watchers are told, but for `stop`, which each needs.

    Raises:
        UsageError: a request that cannot be served.
        RunError: the run cannot go on.
        Interrupted: `watchers.stop` got a signal.
    """
    watchers = watchers or Watchers()
    processes.join(config.device)
    if processes.index() > 0:
        watchers = Watchers(stop=watchers.stop)
    with ExitStack() as until_the_end:
        how = Beginning(resume, overwrite, watchers.say if wait else None)
        config, output, task, tokenizer = processes.of_main(
            lambda: _begin(config, output, how, watchers, until_the_end)
        )
        # Without a name the environment's request holds.
        with use_backend(config.backend) if config.backend else nullcontext():
            return _train_all(config, task, tokenizer, output, watchers)


@dataclass(frozen=True)
class Beginning:
    """What becomes of a run that is in the folder: `train`'s arguments of these names; `waiting`
    gets a sentence about another one that is in progress.
    """

    resume: bool
    overwrite: bool
    waiting: Callable[[str], None] | None


def _begin(
    config: TrainConfig, output: Path, how: Beginning, watchers: Watchers, until_the_end: ExitStack
) -> tuple[TrainConfig, Path, Task, Any]:
    """Checks all that can be checked before the work, claims the folder until the end, and writes
    there what the experiment is.
    """
    config = config.resolved()
    computing_device(config.device)
    check_machine(config)
    check_trackers(config.report_to)
    _check_output(output, how)
    if is_run(output):
        with claimed(output, how.waiting):  # a run in progress is noticed before the data is read
            pass
    locate(config.model)  # a missing one is noticed before the data is read
    task = load_task(
        config.task, config.eval, config.columns, watchers.say, config.label_separator, config.more
    )
    config = for_problem(config, task.problem)
    tokenizer = PROBLEMS[task.problem].tokenizer(config.model)
    config = with_lengths(config, tokenizer, task)
    _check_draws(task, config, watchers)
    config = replace(config, epochs=epochs_of(config, task))
    check_method(config, task)
    require_writable(output)
    until_the_end.enter_context(claimed(output, how.waiting))
    _check_output(output, how)  # another run may have ended meanwhile
    clear_partial(output)
    if how.overwrite and is_run(output):
        _clear_run(output)
    if how.resume:
        task = _with_labels_of_run(task, output)
    save_config(config, output)
    write_json(output / TASK_FILE, {"fingerprint": task.fingerprint, "labels": task.labels})
    _describe(task, config, watchers)
    return config, output, task, tokenizer


def is_run(folder: Path) -> bool:
    """Whether an experiment was begun in the folder."""
    return (folder / CONFIG_FILE).is_file()


def _check_output(folder: Path, how: Beginning) -> None:
    if is_run(folder):
        if not (how.resume or how.overwrite):
            raise UsageError(f"output: {folder} holds a run already; --resume or --overwrite it")
        linked = [path for path in _folders_of(folder) if path.is_symlink()]
        if how.overwrite and linked:
            raise UsageError(
                f"output: {linked[0]} is a link, and what it leads to is not overwritten; remove "
                "the link, or name another --output"
            )
        return
    for name in (*_OWN_FILES, ADAPTER_FOLDER):
        if (folder / name).exists():
            raise UsageError(
                f"output: {folder / name} is there already, and no run of ours left it"
            )


def _folders_of(folder: Path) -> list[Path]:
    """The folders inside the folder of an experiment that are its own."""
    return [folder / ADAPTER_FOLDER, *folder.glob("lr-*-seed-*")]


def _clear_run(folder: Path) -> None:
    """Removes an experiment from its folder, and nothing else that lies there."""
    try:
        for path in _folders_of(folder):
            if path.is_dir():
                shutil.rmtree(path)
        for name in _OWN_FILES:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"output: {folder} cannot be cleared ({error.strerror})") from error


def _train_all(
    config: TrainConfig, task: Task, tokenizer: Any, output: Path, watchers: Watchers
) -> dict[str, Any]:
    def run_of(lr: float, seed: int) -> Run:
        return Run(config, task, tokenizer, output, lr, seed)

    def on_dev(result: dict[str, Any]) -> tuple[float, float]:
        return rank(result[dev_metric], result["dev_loss"])

    assert config.metric is not None  # set for the problem
    dev_metric = f"dev_{config.metric}"
    lr, tried = config.lr[0], {}
    if len(config.lr) > 1:
        results_by_lr = {lr: run_of(lr, config.seeds[0]).result(watchers) for lr in config.lr}
        tried = {lr: result[dev_metric] for lr, result in results_by_lr.items()}
        watchers.say(
            f"dev {config.metric} by learning rate: "
            + ", ".join(f"{rate_name(lr)}: {value:.3f}" for lr, value in tried.items())
        )
        lr = max(config.lr, key=lambda rate: on_dev(results_by_lr[rate]))
    runs = {seed: run_of(lr, seed) for seed in config.seeds}
    results = {seed: run.result(watchers) for seed, run in runs.items()}
    for result in results.values():
        for note in result["notes"]:
            watchers.say(note)
    best = max(config.seeds, key=lambda seed: on_dev(results[seed]))
    tried_by_name = {rate_name(rate): value for rate, value in tried.items()}
    return processes.of_main(lambda: _finish(runs, results, best, tried_by_name))


def _finish(
    runs: dict[int, Run],
    results: dict[int, dict[str, Any]],
    best: int,
    tried: dict[str, float],
) -> dict[str, Any]:
    """Tests the seeds' runs, keeps the adapter of the best, and writes what the experiment found,
    which it returns.
    """
    run = runs[best]
    config, task, output = run.config, run.task, run.output
    for seed, each in runs.items():
        results[seed] |= tested(each, output / PREDICTIONS_FILE if seed == best else None)
    with replacing(output / ADAPTER_FOLDER) as partial:
        shutil.copytree(run.adapter, partial)
    histories = {f"seed {seed}": result.pop("history") for seed, result in results.items()}
    title = f"{config.method} on {task.name}"
    draw_curves(output / "curves.png", title, histories, run.metric)
    draw_gates(output / "gates.png", f"{title}, seed {best}", histories[f"seed {best}"])
    summary = metrics(config, task, run.lr, tried, list(results.values()))
    summary["adapter_seed"] = best
    write_json(output / METRICS_FILE, summary)
    return summary


def tested(run: Run, predictions_path: Path | None) -> dict[str, float]:
    """The scores on the test part, of the adapter read back from disk."""
    examples = run.task.test
    device = computing_device(run.config.device)
    answers = Predictor(run.adapter, run.config.model, device)(examples).rows
    if predictions_path is not None:
        with replacing(predictions_path) as partial, partial.open("w", encoding="utf-8") as file:
            for example, answer in zip(examples, answers, strict=True):
                pair = {} if example.pair is None else {"text_pair": example.pair}
                row = {"text": example.text, **pair, "label": example.label}
                file.write(json.dumps(row | answer.tested, ensure_ascii=False) + "\n")
    return run.problem.score(examples, answers, run.task.labels)


def _describe(task: Task, config: TrainConfig, watchers: Watchers) -> None:
    drawn = len(task.train) if config.train_examples is None else config.train_examples
    watchers.say(
        f"{task.name}: train {drawn:,} of {len(task.train):,} examples ({task.sources['train']}); "
        f"dev {len(task.dev):,} for early stopping"
        f"{' and the learning rate' if len(config.lr) > 1 else ''} ({task.sources['dev']}); "
        f"test {len(task.test):,}, read once at the end ({task.sources['test']})"
    )


def check_machine(config: TrainConfig) -> None:
    """Raises UsageError for what this machine or this process cannot do."""
    if config.precision == "fp16" and computing_device(config.device) == "cpu":
        raise UsageError("precision: fp16 needs a GPU; bf16 and fp32 work here")
    check_environment()
    assert config.batch_size is not None  # `resolved` set it
    count = processes.count()
    if config.batch_size % count:
        raise UsageError(
            f"batch-size: expected a multiple of {count}, the number of processes that share each "
            f"batch, got {config.batch_size}"
        )


def check_method(config: TrainConfig, task: Task) -> None:
    """Raises UsageError where the method does not fit the model, before anything is written."""
    empty = PROBLEMS[task.problem].empty(config.model, task.labels)
    if empty is None:
        return  # loading it for the first run raises the reason
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run itself shows them
            get_pelt_model(empty, config.method_for(task.conditions))
    except ValueError as error:
        raise UsageError(f"method {config.method}: {reason(error)}") from error


def epochs_of(config: TrainConfig, task: Task) -> int:
    """The config's number, else the recipe's for so many training examples."""
    if config.epochs is not None:
        return config.epochs
    assert config.batch_size is not None  # `resolved` set it
    examples = len(task.train) if config.train_examples is None else config.train_examples
    step = config.batch_size * config.gradient_accumulation
    return recipe(config.method).epochs_for(examples, step)


def _check_draws(task: Task, config: TrainConfig, watchers: Watchers) -> None:
    """Refuses more examples than there are, and classes that cannot be balanced, before anything is
    written; reports a draw without a class.
    """
    for seed in config.seeds:
        drawn = labels_in(task.draw_train(config.train_examples, seed))
        absent = [label for label in task.labels if label not in drawn]
        if absent and config.class_weights == "balanced":
            raise UsageError(
                "class-weights: expected training examples of every class, got none of "
                f"{shortened(absent)} in what seed {seed} draws; draw more with --train-examples, "
                "or leave the weights out"
            )
        if absent:
            watchers.say(
                f"train-examples: seed {seed} draws no row of {len(absent)} of {len(task.labels)} "
                f"classes: {shortened(absent)}"
            )


def _with_labels_of_run(task: Task, output: Path) -> Task:
    """The task with its labels in the order in which the run in `output` numbers its classes.
    Raises UsageError where the data is not that of the run.
    """
    path = output / TASK_FILE
    if not path.is_file():
        return task  # stopped before the data was read
    before = read_record(path, {"fingerprint": str, "labels": list[str]}, "resume")
    if set(before["labels"]) == set(task.labels):
        task = replace(task, labels=tuple(before["labels"]))
    if before["fingerprint"] != task.fingerprint:
        raise UsageError(f"resume: the data of {task.name} has changed since {output} was begun")
    return task
