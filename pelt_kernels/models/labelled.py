"""A model whose calls take labels of their samples: attributes, tasks, and features of images."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from ..methods import MethodConfig, parts_of
from ..nn import GeneratedWeights
from .attributes import batch_of, labels_of_call
from .conversions import ConvertibleModel
from .task_inputs import FEATURES, TASKS, task_inputs


class LabelledModel(ConvertibleModel):
    """What a `PeltModel` does about the attributes and tasks of a call's sentences."""

    @classmethod
    def _inputs(cls, config: Any = None, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        if not isinstance(config, MethodConfig):
            return ()
        parts = parts_of(config)
        return (*(("attributes",) if parts.attributes else ()), *task_inputs(parts))

    def set_task(self, task: str | int | None) -> None:
        """The task of every call that is not given ``tasks``, by name or number; None: none.

        Raises:
            ValueError: the method has no such task.
        """
        if task is not None and not self._task_inputs.names:
            raise ValueError(
                "set_task: expected a method for several tasks, got "
                f"{self.method_config.method!r}, which has none to choose from"
            )
        self._task_inputs.default = None if task is None else self._task_inputs.number(task)

    def generate(
        self, *args: Any, attributes: Mapping[str, Tensor] | None = None, **kwargs: Any
    ) -> Any:
        """The base model's generate: greedy, sampling or beams, with or without a cache of either
        kind. attributes, tasks and features are those of the B sentences that are read, as in
        `forward`: all beams and samples of a sentence have its own.
        """
        labels = self._labels(attributes, args, kwargs)
        with labels, self._injection.shown_to_generate(), self._keeping_written():
            generate: Any = self.base_model.generate
            return generate(*args, **kwargs)

    def _keeping_written(self) -> AbstractContextManager[None]:
        """Inside, which is one call of generate, networks write their weights once."""
        written = self._injection.written
        if written is None or not isinstance(written.weights, GeneratedWeights):
            return nullcontext()
        return written.weights.keeping()

    def _labels(
        self, attributes: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> AbstractContextManager[None]:
        """Inside, the layers read the labels of this call. Takes tasks and features out of the
        arguments, which are then the base model's.
        """
        tasks, features = kwargs.pop(TASKS, None), kwargs.pop(FEATURES, None)
        if self._is_detached:
            return self._injection.call.given({})
        labels = labels_of_call(attributes, parts_of(self.method_config).attributes, args, kwargs)
        batch, device = batch_of(args, kwargs), self.base_model.device
        labels |= self._task_inputs.labels(tasks, features, batch, device)
        return self._injection.call.given(labels)
