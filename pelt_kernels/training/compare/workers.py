"""Where runs are done: in this process one after the other, or in several at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Protocol

from ..errors import RunError, UsageError, reason
from ..experiment_run import Watchers
from .protocol import Comparison, Job
from .rows import Row
from .runs import Runner


class Workers(Protocol):
    """Takes jobs and gives rows."""

    @property
    def has_room(self) -> bool:
        """Whether another job can be submitted now."""

    def submit(self, job: Job) -> None:
        """Begins a job."""

    def next(self) -> tuple[Job, Row]:
        """Waits for the end of one of the jobs."""


class Here:
    """This process, with all of its threads."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._job: Job | None = None

    @property
    def has_room(self) -> bool:
        return self._job is None

    def submit(self, job: Job) -> None:
        self._job = job

    def next(self) -> tuple[Job, Row]:
        job, self._job = self._job, None
        assert job is not None
        return job, self._runner.row(job)


class _Worker:
    """A process that does one job after the other. Loading libraries takes it longer than many a
    run takes, so it stays for all of them.
    """

    def __init__(self, comparison: Comparison, output: Path) -> None:
        context = multiprocessing.get_context("spawn")  # forked threads of OpenMP would hang
        self.connection, inner = context.Pipe()
        arguments = (inner, comparison, output)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        with _one_thread():
            self.process.start()
        inner.close()
        self.job: Job | None = None


class Processes:
    """Worker processes, each with one thread; they end with this process, however it ends."""

    def __init__(self, comparison: Comparison, output: Path, count: int) -> None:
        self._workers = [_Worker(comparison, output) for _ in range(count)]

    @property
    def has_room(self) -> bool:
        return any(worker.job is None for worker in self._workers)

    def submit(self, job: Job) -> None:
        worker = next(worker for worker in self._workers if worker.job is None)
        worker.job = job
        try:
            worker.connection.send(job)
        except OSError as error:
            raise self._died(worker) from error

    def next(self) -> tuple[Job, Row]:
        """Raises RunError where a process was killed, and what a run raised."""
        busy = {worker.connection: worker for worker in self._workers if worker.job is not None}
        worker = busy[wait(list(busy))[0]]  # type: ignore[index]
        job, worker.job = worker.job, None
        assert job is not None
        try:
            answer = worker.connection.recv()
        except EOFError as error:
            worker.job = job
            raise self._died(worker) from error
        if isinstance(answer, BaseException):
            raise answer
        return job, answer

    def _died(self, worker: _Worker) -> RunError:
        worker.process.join()
        code = worker.process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        during = worker.job.title if worker.job else "its start"
        return RunError(f"a worker process ended by {how} during {during}")

    def close(self) -> None:
        """Ends the processes at once: what they have not finished is done again."""
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()


@contextmanager
def workers_for(runner: Runner, jobs: int) -> Iterator[Workers]:
    """This process for one job at a time, else so many processes, ended with the block."""
    if jobs == 1:
        yield Here(runner)
        return
    processes = Processes(runner.comparison, runner.output, jobs)
    try:
        yield processes
    finally:
        processes.close()


@contextmanager
def _one_thread() -> Iterator[None]:
    """OpenMP in processes that start in the block uses one thread, so that they do not wait for
    each other's.
    """
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before


def _serve(connection: Connection, comparison: Comparison, output: Path) -> None:
    """What a worker process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _silence_libraries()
    runner = Runner(comparison, output, Watchers())
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send(_answer(runner, job))


def _answer(runner: Runner, job: Job) -> Row | BaseException:
    """The row of a job, or the error to be raised for it."""
    try:
        return runner.row(job)
    except (UsageError, RunError) as error:
        return type(error)(f"{job.title}: {error}")
    except Exception as error:
        where = traceback.format_exc()
        return RunError(f"{job.title}: unexpected {type(error).__name__}: {reason(error)}\n{where}")


def _end_with_parent() -> None:
    """Ends this process when the parent has ended, even by a signal that it cannot answer: else two
    processes could write in a folder once the command is started again.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _silence_libraries() -> None:
    import warnings

    from transformers.utils import logging

    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
