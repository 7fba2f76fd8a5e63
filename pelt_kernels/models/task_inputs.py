"""The tasks of a batch's sentences, and features of their images, as inputs of the model: checked
before anything runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..methods import Parts
from ..nn.task_adapters import BYPASS

# Names of a call's labels; the first and the last are names of a call's inputs, too.
TASKS = "tasks"  # int64 [B]; of HyperPELT into the entries
ENTRIES = "task_entries"  # int64 [n]: what weights are written for
FEATURES = "image_features"  # [n, cells, F]


def task_inputs(parts: Parts) -> tuple[str, ...]:
    """The names of what a model with these parts takes beside the base model's inputs."""
    if not parts.tasks:
        return ()
    has_features = parts.hyper is not None and parts.hyper.features is not None
    return (TASKS, FEATURES) if has_features else (TASKS,)


class TaskInputs:
    """Reads a call's inputs for the parts of a model.

    Attributes:
        default: the task, by number, of calls that are not given any; None: the only task.
    """

    def __init__(self, parts: Parts) -> None:
        self.names = parts.tasks
        self.is_written = parts.hyper is not None
        self.lowest = 0 if self.is_written else BYPASS
        self.features = None if parts.hyper is None else parts.hyper.features
        self.default: int | None = None

    def number(self, task: Any) -> int:
        """The number of a task that is given by number or name."""
        if isinstance(task, str) and task in self.names:
            return self.names.index(task)
        is_number = isinstance(task, int) and not isinstance(task, bool)
        if is_number and self.lowest <= task < len(self.names):
            return int(task)
        raise ValueError(f"PeltModel: expected tasks {self._words()}, got {task!r:.80}")

    def labels(
        self, tasks: Any, features: Any, batch: int | None, device: torch.device
    ) -> dict[str, Tensor]:
        """What a call's layers read, by name; empty where there are no tasks.

        Args:
            tasks: None, a name or a number for the whole batch, a list of them for its sentences,
                or int64 [B].
            features: None, or of the sentences' images [B, cells, F].
            batch: B, where the call says it.

        Raises:
            ValueError: tasks that are missing, unknown, of another number than the sentences;
                features that are missing, not wanted, or of a wrong shape.
        """
        if not self.names:
            if tasks is not None or features is not None:
                given = TASKS if tasks is not None else FEATURES
                raise ValueError(
                    f"PeltModel: expected no {given}, as the method has no tasks to choose from"
                )
            return {}
        index = self._index(tasks, batch, device)
        self._check_features(features, batch)
        if not self.is_written:
            return {TASKS: index}
        if features is not None:
            entries = index.expand(features.shape[0])
            samples = torch.arange(features.shape[0], device=device)
            return {TASKS: samples, ENTRIES: entries, FEATURES: features.to(device)}
        if index.shape[0] == 1:
            return {TASKS: torch.zeros_like(index), ENTRIES: index}
        if index.device.type == "cpu" and not torch.compiler.is_compiling():
            entries, index = index.unique(return_inverse=True)
            return {TASKS: index, ENTRIES: entries}
        # Which tasks there are is not asked, which would stop the stream.
        return {TASKS: index, ENTRIES: torch.arange(len(self.names), device=device)}

    def _index(self, tasks: Any, batch: int | None, device: torch.device) -> Tensor:
        """int64 [B], or [1] where all sentences are known to have the same."""
        if tasks is None:
            if self.default is None and len(self.names) > 1:
                raise ValueError(
                    f"PeltModel: expected tasks {self._words()}, got none; set_task() sets one for "
                    "all calls"
                )
            tasks = 0 if self.default is None else self.default
        if isinstance(tasks, (str, int)):
            return torch.full((1,), self.number(tasks), device=device)
        if isinstance(tasks, Sequence):
            tasks = torch.tensor([self.number(task) for task in tasks], dtype=torch.int64)
        if not isinstance(tasks, Tensor) or tasks.dtype != torch.int64 or tasks.ndim > 1:
            got = (
                f"{list(tasks.shape)} {str(tasks.dtype).removeprefix('torch.')}"
                if isinstance(tasks, Tensor)
                else type(tasks).__name__
            )
            raise ValueError(
                f"PeltModel: expected tasks as names, numbers or a tensor int64 [B], got {got}"
            )
        tasks = tasks.view(-1) if tasks.ndim == 0 else tasks
        if batch not in (None, tasks.shape[0]) and tasks.shape[0] != 1:
            raise ValueError(
                f"PeltModel: expected tasks [{batch}], one for each sentence, got {tasks.shape[0]}"
            )
        if tasks.device.type == "cpu" and not torch.compiler.is_compiling() and tasks.shape[0]:
            for edge in (int(tasks.min()), int(tasks.max())):
                self.number(edge)
            if bool((tasks == tasks[0]).all()):
                return torch.full((1,), int(tasks[0]), device=device)
        return tasks.to(device)

    def _check_features(self, features: Any, batch: int | None) -> None:
        """Raises ValueError unless features are there where they are wanted, in their shape."""
        if features is None and self.features is None:
            return
        count = "B" if batch is None else batch
        wanted = f"[{count}, cells, {self.features}]" if self.features is not None else "none"
        if isinstance(features, Tensor) and self.features is not None:
            is_right = (
                features.ndim == 3
                and features.shape[2] == self.features
                and features.shape[1] > 0
                and batch in (None, features.shape[0])
                and features.is_floating_point()
            )
            if is_right:
                return
        got = (
            f"{list(features.shape)} {str(features.dtype).removeprefix('torch.')}"
            if isinstance(features, Tensor)
            else "none"
            if features is None
            else type(features).__name__
        )
        raise ValueError(
            f"PeltModel: expected {FEATURES} {wanted} of floating-point numbers, got {got}"
            if self.features is not None
            else f"PeltModel: expected no {FEATURES}, as the method has no features, got {got}"
        )

    def _words(self) -> str:
        bypass = f", or {BYPASS} for no adapter" if self.lowest == BYPASS else ""
        return (
            f"out of {', '.join(self.names)} (0 to {len(self.names) - 1}){bypass}, one for each "
            "sentence or one for all"
        )
