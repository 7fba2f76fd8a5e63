"""Ending a run before its last step: on a signal, or because dev no longer improves."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from . import processes
from .errors import Interrupted
from .metrics import ANSWERS

IS_PRUNING = "is_pruning"  # marks an evaluation at a sparsity below the final one
# Smaller differences do not count: one answer in a million examples changes a score by more, and
# training that still learns changes the loss by more.
SCORE_DIGITS, LOSS_DIGITS = 6, 4


class Stop(TrainerCallback):
    """Stops training on a signal, after the next checkpoint.

    While training runs, after the first signal the current step (and the evaluation, where one is
    due) ends and a checkpoint is written; a second signal ends the run at once. Outside training
    every signal does. `say` gets a sentence about the wait. Several processes stop together, at the
    end of the step by which one of them has got its signal.
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
        self._end_if_requested()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._requested() is None:
            return
        steps_per_epoch = state.max_steps // state.num_train_epochs
        if (
            args.eval_strategy == IntervalStrategy.EPOCH
            and state.global_step % steps_per_epoch == 0
        ):
            return  # the epoch's evaluation follows, and its checkpoint holds it
        control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._end_if_requested()

    def _requested(self) -> int | None:
        """The signal that this process or another has got. Every process has to ask together."""
        return processes.largest(self.number or 0) or None

    def _end_if_requested(self) -> None:
        number = self._requested()
        if number is not None:
            self._can_wait = False
            raise Interrupted(number)


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
    """Stops after `patience` evaluations on dev without a gain in `metric`.

    It counts in the history, which every checkpoint holds, so it needs no state of its own.
    """

    def __init__(self, metric: str, patience: int):
        self.metric, self.patience = metric, patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if evaluations_without_gain(state.log_history, self.metric) >= self.patience:
            control.should_training_stop = True


def rank(score: float, loss: float) -> tuple[float, float]:
    """What orders evaluations: the score on dev, and between equal scores the lower loss on dev.

    On few or unbalanced examples the score can stand still for epochs (at the share of the largest
    class) while the loss falls and the model learns.
    """
    return round(score, SCORE_DIGITS), -round(loss, LOSS_DIGITS)


def best_evaluation(history: Sequence[dict[str, Any]], metric: str) -> dict[str, Any] | None:
    """The entry of the evaluation that is best by `rank`, the earliest of equals; None where no
    evaluation counts.
    """
    counted = _counted(history, metric)
    return max(counted, key=lambda entry: _rank(entry, metric)) if counted else None


def evaluations_without_gain(history: Sequence[dict[str, Any]], metric: str) -> int:
    """The number of evaluations since the last gain. A gain is an evaluation that is better by
    `rank` than all before it, or, where the model gives all of dev the same answer, has a lower
    loss: such a model is still learning, and an earlier one may have scored more by chance.
    """
    since = 0
    best, lowest = (-math.inf, -math.inf), math.inf
    for entry in _counted(history, metric):
        current, loss = _rank(entry, metric), round(entry["eval_loss"], LOSS_DIGITS)
        is_learning = is_constant(entry) and loss < lowest
        since = 0 if current > best or is_learning else since + 1
        best, lowest = max(best, current), min(lowest, loss)
    return since


def is_constant(entry: dict[str, Any]) -> bool:
    """Whether the model gave all of dev the same answer in an evaluation."""
    return entry.get(f"eval_{ANSWERS}") == 1


def _rank(entry: dict[str, Any], metric: str) -> tuple[float, float]:
    return rank(entry[f"eval_{metric}"], entry["eval_loss"])


def _counted(history: Sequence[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """The evaluations, without those at a sparsity that was still rising."""
    return [entry for entry in history if f"eval_{metric}" in entry and not entry.get(IS_PRUNING)]
