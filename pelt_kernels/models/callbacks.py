"""What a method does beside the forward while it is trained, for transformers.Trainer."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from ..methods import Parts
from ..nn import spare_unselected


class LastStep(TrainerCallback):
    """Has the end of training evaluated, also where evaluations come every so many steps."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step >= state.max_steps and args.eval_strategy == IntervalStrategy.STEPS:
            control.should_evaluate = True


class SparsitySchedule(LastStep):
    """Raises PST's sparsity with the steps taken, and has the end of training evaluated: a model
    counts only at its final sparsity.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.model.set_progress(state.global_step / state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.model.set_progress(state.global_step / state.max_steps)
        super().on_step_end(args, state, control)


class SparedExperts(TrainerCallback):
    """Has the optimizer leave alone the experts that a step did not draw, and the tasks that were
    not in its batch: `spare_unselected`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._hooks: list[Any] = []

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        # accelerate's wrapper has no hooks of its own.
        self._hooks = spare_unselected(getattr(optimizer, "optimizer", optimizer), self.model)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def callbacks_for(model: Any, parts: Parts) -> list[TrainerCallback]:
    """What training a `PeltModel` needs, by its parts."""
    made: list[TrainerCallback] = []
    if parts.pruning is not None:
        made.append(SparsitySchedule(model))
    if parts.mixture is not None or (parts.vlm is not None and len(parts.vlm.tasks) > 1):
        made.append(SparedExperts(model))
    return made
