"""A bar with loss and time left, and a line for each evaluation."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback


@contextmanager
def progress_bars(console: Console) -> Iterator[Callable[[str], list[TrainerCallback]]]:
    """What makes the bar of a run by its title, one below the other; removed however the block
    ends.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield lambda title: [RunProgress(progress, console, title)]


@contextmanager
def counting(console: Console, title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A bar, and the function that moves it; `total` is None where it is unknown."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    # Lines printed to a terminal show the progress, and would move a bar below them.
    is_shown = console.is_terminal and not sys.stdout.isatty()
    with Progress(*columns, console=console, disable=not is_shown) as progress:
        bar = progress.add_task(title, total=total)
        yield lambda count: progress.advance(bar, count)


class RunProgress(TrainerCallback):
    """Follows one run."""

    def __init__(self, progress: Progress, console: Console, title: str):
        self.progress, self.console, self.title = progress, console, title
        self.loss = ""

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = self.progress.add_task(
            self.title, total=state.max_steps, completed=state.global_step, loss=""
        )
        self.start, self.first_step = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.loss = f"loss {logs['loss']:.3f}"
            self.progress.update(self.bar, loss=self.loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.update(self.bar, completed=state.global_step)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any
    ) -> None:
        if metrics:
            metric = args.metric_for_best_model
            self.console.print(
                f"{self.title}: step {state.global_step}/{state.max_steps}  {self.loss}  dev "
                f"{metric} {metrics[f'eval_{metric}']:.3f}  {self._left(state)}",
                soft_wrap=True,
            )

    def _left(self, state: Any) -> str:
        """The time left, for logs, which have no bar. Early stopping may end the run earlier."""
        pace = (time.monotonic() - self.start) / max(1, state.global_step - self.first_step)
        minutes, seconds = divmod(round(pace * (state.max_steps - state.global_step)), 60)
        return f"at most {minutes}:{seconds:02} left"

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.remove_task(self.bar)  # a run that stopped early would stay unfinished
