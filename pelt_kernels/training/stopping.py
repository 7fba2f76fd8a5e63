"""Ending a run before its last step: on a signal, or because dev no longer improves."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from .errors import Interrupted

BEST_METRIC = "eval_accuracy"
IS_PRUNING = "is_pruning"  # marks an evaluation at a sparsity below the final one


class Stop(TrainerCallback):
    """A wish to stop, granted after the next checkpoint.

    While training runs, the first signal lets the current step (and the evaluation, where one is
    due) end and a checkpoint be written; a second one ends the run at once. Outside training every
    signal does. `say` is told of the wait.
    """

    def __init__(self, say: Callable[[str], None] = lambda sentence: None) -> None:
        self.say = say
        self.number: int | None = None
        self._can_wait = False

    def request(self, number: int, _frame: FrameType | None = None) -> None:
        """Handles a signal."""
        if self.number is None and self._can_wait:
            self.number = number
            name = signal.Signals(number).name
            self.say(f"{name}: stopping after the next checkpoint; once more to stop at once")
            return
        raise Interrupted(number)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._can_wait = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._can_wait = False
        self._grant()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.number is None:
            return
        steps_per_epoch = state.max_steps // state.num_train_epochs
        if (
            args.eval_strategy == IntervalStrategy.EPOCH
            and state.global_step % steps_per_epoch == 0
        ):
            return  # the epoch's evaluation and checkpoint follow; one before would leave it out
        control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._grant()

    def _grant(self) -> None:
        if self.number is not None:
            self._can_wait = False
            raise Interrupted(self.number)


@contextmanager
def stoppable(say: Callable[[str], None]) -> Iterator[Stop]:
    """Sends SIGINT and SIGTERM to a `Stop` while the block runs. Main thread only."""
    stop = Stop(say)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, stop.request)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class EarlyStopping(TrainerCallback):
    """Stops after `patience` evaluations on dev without a gain.

    It counts in the history, which every checkpoint holds, so it needs no state of its own.
    """

    def __init__(self, patience: int):
        self.patience = patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if evaluations_without_gain(state.log_history) >= self.patience:
            control.should_training_stop = True


def evaluations_without_gain(history: Sequence[dict[str, Any]]) -> int:
    """How many evaluations lie behind the (first) best one; those at a sparsity that still rose do
    not count.
    """
    values = [
        entry[BEST_METRIC]
        for entry in history
        if BEST_METRIC in entry and not entry.get(IS_PRUNING)
    ]
    return len(values) - 1 - values.index(max(values)) if values else 0
