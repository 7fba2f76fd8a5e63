"""One run of a comparison: the rows it learns from, its training, its row in the results."""

from __future__ import annotations

import random
import re
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...ops import use_backend
from ..config import TrainConfig, for_problem
from ..errors import DivergedError, UsageError
from ..experiment import epochs_of, tested
from ..experiment_run import Run, Watchers
from ..lengths import with_lengths
from ..problems import PROBLEMS
from ..tasks import Task, load_task
from .protocol import Comparison, Job, Source, size_name

RUNS_FOLDER = "runs"
DEV_KEPT = ("best_step", "steps", "trainable_parameters", "total_parameters", "notes", "backends")


def split(task: Task, count: int | None, data_seed: int, dev_examples: int) -> Task:
    """The task with `count` of its training rows and, as dev, the `dev_examples` that come next in
    the order drawn by `data_seed`; all rows, and the task's own dev part, where `count` is None.

    Rows are taken from one permutation of the training part, so that K = 100 lies inside K = 500,
    as in UniPELT's code, which shuffles by one seed (42), takes the first K for training and the
    next 1 000 for choosing, and varies the seed of training alone. All methods and seeds of a
    comparison so learn from the same rows, and what differs between seeds is training. A dev row
    whose texts stand among the K is left out. With ``dev_examples=0`` dev is the training rows,
    which then decide nothing: the last step is kept.

    Raises UsageError where too few rows are left.
    """
    if count is None:
        return task if dev_examples else replace(task, dev=task.train)
    order = list(task.train)
    random.Random(f"split {data_seed}").shuffle(order)
    drawn, rest = order[:count], order[count:]
    contents = {example.content for example in drawn}
    dev = [example for example in rest if example.content not in contents][:dev_examples]
    if len(drawn) < count or (dev_examples and not dev):
        raise UsageError(
            f"train-examples: {count} were asked for, and some for dev, but {task.name} leaves "
            f"{len(task.train)} after its own dev and test parts"
        )
    sources = task.sources | {"dev": f"the next rows of {task.sources['train']}"}
    if not dev_examples:
        return replace(task, train=tuple(drawn), dev=tuple(drawn))
    return replace(task, train=tuple(drawn), dev=tuple(dev), sources=sources)


@dataclass
class Runner:
    """Does the runs of a comparison in this process; data is read once for all of them."""

    comparison: Comparison
    output: Path
    watchers: Watchers = field(default_factory=Watchers)
    _tasks: dict[str, Task] = field(default_factory=dict)
    _parts: dict[tuple[str, int | None], Task] = field(default_factory=dict)
    _tokenizers: dict[str, Any] = field(default_factory=dict)

    def task(self, name: str) -> Task:
        """A task by its name in the comparison. Raises UsageError, RunError."""
        if name not in self._tasks:
            source = self.source(name)
            task = load_task(source.task, source.eval, say=self.watchers.say)
            self._tasks[name] = replace(task, name=name)
        return self._tasks[name]

    def source(self, name: str) -> Source:
        """Where a task comes from."""
        return next(each for each in self.comparison.tasks if each.name == name)

    def part(self, name: str, count: int | None) -> Task:
        """The task as runs with `count` training examples have it."""
        if (name, count) not in self._parts:
            seed, dev = self.comparison.data_seed, self.comparison.dev_examples
            self._parts[name, count] = split(self.task(name), count, seed, dev)
        return self._parts[name, count]

    def tokenizer(self, task: Task) -> Any:
        """That of the model, for a task's problem."""
        if task.problem not in self._tokenizers:
            problem = PROBLEMS[task.problem]
            self._tokenizers[task.problem] = problem.tokenizer(self.comparison.model)
        return self._tokenizers[task.problem]

    def config(self, task: Task, method: str) -> TrainConfig:
        """What runs of a method on a task, or a part of it, have in common. Raises UsageError."""
        config = self.comparison.config(self.source(task.name), method)
        config = for_problem(config, task.problem)
        return with_lengths(config, self.tokenizer(task), task)

    def run(self, job: Job) -> Run:
        """The run of a job, which `Run.result` trains. Raises UsageError."""
        task = self.part(job.task, job.train_examples)
        config = self.config(task, job.method)
        config = replace(config, epochs=epochs_of(config, task))
        folder = cell_folder(self.output, job)
        return Run(config, task, self.tokenizer(task), folder, job.lr, job.seed)

    def row(self, job: Job) -> dict[str, Any]:
        """Trains, or reads what an earlier process has trained; tests where the job says so."""
        started = time.process_time()
        run = self.run(job)
        backend = self.comparison.backend
        with use_backend(backend) if backend else nullcontext():
            try:
                found = self._trained(run)
            except DivergedError as error:
                found = {"error": str(error)}
            if job.is_tested and "error" not in found:
                found["test"] = tested(run, None)
        sizes = {"dev": len(run.task.dev), "test": len(run.task.test)}
        return {
            **job._asdict(),
            "metric": run.metric,
            "error": None,
            "dev": None,
            "test": None,
            **found,
            "dev_examples": sizes["dev"] if self.comparison.dev_examples else 0,
            "test_examples": sizes["test"],
            "processor_seconds": time.process_time() - started,
        }

    def _trained(self, run: Run) -> dict[str, Any]:
        result = run.result(self.watchers)
        names = (*run.problem.metrics, "loss")
        dev = {name: result[f"dev_{name}"] for name in names}
        kept = {name: result[name] for name in DEV_KEPT}
        return {"dev": dev if self.comparison.dev_examples else None, **kept}


def cell_folder(output: Path, job: Job) -> Path:
    """Where the runs of one method on one task with K examples are kept until it is finished."""
    parts = (job.task, f"k-{size_name(job.train_examples)}", job.method)
    return output.joinpath(RUNS_FOLDER, *(re.sub(r"[^\w.-]+", "-", part) for part in parts))
