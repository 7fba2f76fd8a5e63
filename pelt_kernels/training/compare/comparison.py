"""A comparison from one description: which run comes next, what is kept, when it is finished."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..._hardware import hardware
from ..base_model import locate
from ..errors import Interrupted, RunError, UsageError
from ..experiment import check_machine, check_method
from ..experiment_run import Watchers
from ..machine import computing_device, versions
from ..records import read_record
from ..stopping import rank
from ..storage import claimed, clear_partial, replacing, require_writable, write_json
from .parameters import stored_parameters
from .plots import draw_scores
from .protocol import GROWING, Cell, Comparison, Job, size_name
from .rows import Key, Row, read_rows, write_rows
from .runs import RUNS_FOLDER, Runner, cell_folder
from .summary import cells_of, summed_up
from .tables import markdown
from .workers import workers_for

SETTINGS_FILE, SUMMARY_FILE = "comparison.json", "compare.json"
TABLE_FILE, PLOT_FILE = "compare.md", "compare.png"


def compare(
    comparison: Comparison,
    output: Path,
    *,
    jobs: int | None = None,
    wait: bool = False,
    watchers: Watchers | None = None,
) -> dict[str, Any]:
    """Does every run of a comparison that `output` does not hold yet, and sums them up.

    For each task, number of training examples and method: one run for each learning rate with the
    first seed, of which the best on dev serves all seeds; then one run for each seed, the best of
    its evaluations on dev, tested once. `output` then holds ``results.jsonl``, a row for each run,
    written when it ends; ``compare.json``, ``compare.md`` and ``compare.png`` sum them up. Called
    again with the same `output` it goes on where it was stopped, and does what was added: tasks,
    methods, training examples, seeds.

    Args:
        jobs: processes, of one thread each; with 1 the runs are done in this one, with all of its
            threads. None: one for each core, or 1 where there is a GPU.

    Returns:
        What `compare.json` holds.

    Raises:
        UsageError: a comparison that cannot be made; nothing is trained before it is known.
        RunError: a run cannot go on, or a worker process was killed.
        Interrupted: `watchers.stop` got a signal.
    """
    watchers = watchers or Watchers()
    comparison.check()
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs: expected 1 or more, got {jobs}")
    locate(comparison.model)
    runner = Runner(comparison, output, watchers)
    _check_all(runner)
    settings = _settings(runner)
    require_writable(output)
    with claimed(output, watchers.say if wait else None):
        clear_partial(output)
        _check_same(output, settings)
        write_json(output / SETTINGS_FILE, settings)
        work = _Work(runner, read_rows(output), jobs or _cores(comparison))
        try:
            work.finish()
        except Interrupted as stopped:
            sentence = f"{str(stopped).partition(';')[0]}; {work.how_to_go_on()}"
            raise Interrupted(stopped.number, sentence) from stopped
        except RunError as error:
            raise RunError(f"{error}; {work.how_to_go_on()}") from error
        if (output / RUNS_FOLDER).is_dir():
            shutil.rmtree(output / RUNS_FOLDER)
        return _write_summary(runner, work.rows, settings)


def report(output: Path, *, watchers: Watchers | None = None) -> dict[str, Any]:
    """Sums up what is finished of the comparison in `output`, which may go on meanwhile.

    Raises UsageError where there is none, or where its data is no longer what it was.
    """
    path = output / SETTINGS_FILE
    if not path.is_file():
        raise UsageError(f"output: {output} holds no comparison ({SETTINGS_FILE} is missing)")
    comparison = Comparison.restored(read_record(path, {"tasks": list[dict[str, Any]]}, "output"))
    runner = Runner(comparison, output, watchers or Watchers())
    settings = _settings(runner)
    _check_same(output, settings)
    rows = read_rows(output)
    if not rows:
        raise UsageError(f"output: no run of the comparison in {output} is finished yet")
    return _write_summary(runner, rows, settings)


@dataclass
class _Work:
    """The runs of a comparison: those that are finished, under way and left."""

    runner: Runner
    rows: dict[Key, Row]
    jobs: int
    under_way: set[Key] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.cells = list(cells(self.comparison))
        self.began, self.done_at_first = time.monotonic(), self.done

    @property
    def comparison(self) -> Comparison:
        return self.runner.comparison

    @property
    def done(self) -> int:
        """How many runs are finished."""
        wanted = {cell[:3] for cell in self.cells}
        return sum(key[:3] in wanted for key in self.rows)

    @property
    def total(self) -> int:
        """How many there are in all."""
        seeds = len(self.comparison.seeds)
        return sum(len(self.comparison.rates(cell[2])) - 1 + seeds for cell in self.cells)

    def finish(self) -> None:
        """Does what is left, in the order of the cells; each row is written when its run ends."""
        left = [cell for cell in self.cells if any(self.todo(cell))]
        if not left:
            return
        self.runner.watchers.say(
            f"{self.total - self.done} of {self.total} runs are left, in {self.jobs} process(es)"
        )
        with workers_for(self.runner, min(self.jobs, self.total - self.done) or 1) as workers:
            while True:
                while workers.has_room and (job := self._next(left)) is not None:
                    self.under_way.add(job.key)
                    workers.submit(job)
                if not self.under_way:
                    return
                job, row = workers.next()
                self.under_way.discard(job.key)
                self._keep(job, row)
                left = [cell for cell in left if any(self.todo(cell))]

    def todo(self, cell: Cell) -> Iterator[Job]:
        """The runs of a cell that can be done now: all rates with the first seed, then, with the
        chosen one, all seeds.
        """
        rates, seeds = self.comparison.rates(cell[2]), self.comparison.seeds
        if len(rates) > 1:
            trials = [Job(*cell, lr, seeds[0], is_tested=False) for lr in rates]
            missing = [job for job in trials if job.key not in self.rows]
            if missing:
                yield from missing
                return
        chosen = chosen_rate(rates, seeds[0], cell, self.rows)
        if chosen is None:
            return  # no rate trains
        for seed in seeds:
            job = Job(*cell, chosen, seed, is_tested=True)
            if not self.rows.get(job.key, {}).get("is_tested"):
                yield job

    def _next(self, left: Sequence[Cell]) -> Job | None:
        jobs = (job for cell in left for job in self.todo(cell))
        return next((job for job in jobs if job.key not in self.under_way), None)

    def _keep(self, job: Job, row: Row) -> None:
        output = self.runner.output
        before = self.rows.get(job.key)
        if before is not None:  # trained as a trial of its rate, and now tested
            row["processor_seconds"] += before["processor_seconds"]
        self.rows[job.key] = row
        write_rows(output, self.rows, self.cells)
        cell = (job.task, job.train_examples, job.method)
        folder = cell_folder(output, job)
        if not any(self.todo(cell)) and folder.is_dir():
            shutil.rmtree(folder)  # its rows say all
        self.runner.watchers.say(self._sentence(job, row, is_new=before is None))

    def _sentence(self, job: Job, row: Row, is_new: bool) -> str:
        if row["error"]:
            found = row["error"]
        else:
            scores = {name: row[name] for name in ("dev", "test") if row[name]}
            found = ", ".join(f"{name} {s[row['metric']]:.3f}" for name, s in scores.items())
        pace = (time.monotonic() - self.began) / max(1, self.done - self.done_at_first)
        left = round(pace * (self.total - self.done) / 60)
        when = f"about {left // 60}:{left % 60:02} h left" if is_new else "tested"
        return f"{job.title}: {found}; {self.done} of {self.total} runs, {when}"

    def how_to_go_on(self) -> str:
        """What is kept, and what to do after a stop."""
        return (
            f"{self.done} of {self.total} runs are finished and kept in {self.runner.output}; the "
            "same command goes on"
        )


def cells(comparison: Comparison) -> Iterator[Cell]:
    """What is filled, few examples of all tasks first."""
    for count in comparison.train_examples:
        for source in comparison.tasks:
            for method in comparison.methods:
                yield source.name, count, method


def chosen_rate(
    rates: Sequence[float], seed: int, cell: Cell, rows: dict[Key, Row]
) -> float | None:
    """Of the rates the one that is best on dev with a seed, the earliest of equals; None where not
    all were tried yet, or all diverge.
    """
    if len(rates) == 1:
        return rates[0]
    keys = {lr: (*cell, lr, seed) for lr in rates}
    if not all(key in rows for key in keys.values()):
        return None
    found = {lr: rows[key] for lr, key in keys.items()}
    trained = [lr for lr, row in found.items() if row["error"] is None]

    def on_dev(lr: float) -> tuple[float, float]:
        return rank(found[lr]["dev"][found[lr]["metric"]], found[lr]["dev"]["loss"])

    return max(trained, key=on_dev) if trained else None


def _check_all(runner: Runner) -> None:
    """Raises UsageError for what no run could do, and says which classes a draw leaves out."""
    comparison = runner.comparison
    for source in comparison.tasks:
        task = runner.task(source.name)
        for count in comparison.train_examples:
            part = runner.part(source.name, count)
            absent = [name for name in task.labels if all(e.label != name for e in part.train)]
            if absent and task.problem == "classification":
                runner.watchers.say(
                    f"{source.name}: no row of {len(absent)} of {len(task.labels)} classes is "
                    f"among the {size_name(count)} for training: {', '.join(absent)}"
                )
        for method in comparison.methods:
            config = runner.config(task, method)
            check_machine(config)
            check_method(config, task)


def _settings(runner: Runner) -> dict[str, Any]:
    """What `comparison.json` holds: the comparison and the fingerprints of its data."""
    comparison = runner.comparison
    prints = {source.name: runner.task(source.name).fingerprint for source in comparison.tasks}
    return comparison.stored() | {"fingerprints": prints}


def _check_same(output: Path, settings: dict[str, Any]) -> None:
    """Raises UsageError where the comparison in `output` was begun with other settings."""
    path = output / SETTINGS_FILE
    if not path.is_file():
        return
    before = read_record(path, {"seeds": list[int], "fingerprints": dict[str, str]}, "output")
    for name, value in settings.items():
        old: Any = before.get(name)
        if name == "fingerprints":
            changed = [task for task, digest in old.items() if value.get(task, digest) != digest]
            if changed:
                raise UsageError(f"output: the data of {changed[0]} has changed since {path}")
        elif name == "seeds":
            if old[0] != value[0]:
                raise UsageError(
                    f"seeds: the comparison in {output} chose its rates with seed {old[0]}; begin "
                    "with that one, or name another --output"
                )
        elif name not in GROWING and old != value:
            raise UsageError(
                f"{name.replace('_', '-')}: the comparison in {output} was begun with {old}, not "
                f"{value}; leave the option as it was, or name another --output"
            )


def _write_summary(
    runner: Runner, rows: dict[Key, Row], settings: dict[str, Any]
) -> dict[str, Any]:
    comparison, output = runner.comparison, runner.output
    chosen = {
        cell: chosen_rate(comparison.rates(cell[2]), comparison.seeds[0], cell, rows)
        for cell in cells(comparison)
    }
    finished = list(cells_of(comparison, rows, chosen))
    summary = {
        **summed_up(finished),
        "cells": finished,
        "parameters": {method: stored_parameters(runner, method) for method in comparison.methods},
        "settings": settings,
        "hardware": hardware(),
        "versions": versions(),
    }
    write_json(output / SUMMARY_FILE, summary)
    with replacing(output / TABLE_FILE) as partial:
        partial.write_text(markdown(summary), encoding="utf-8")
    draw_scores(output / PLOT_FILE, summary)
    return summary


def _cores(comparison: Comparison) -> int:
    """How many processes to use."""
    if torch.cuda.is_available() and computing_device(comparison.device) == "cuda":
        return 1
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
