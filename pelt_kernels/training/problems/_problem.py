"""What every problem gives to a run and to `predict`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor

from ..tasks import Example


class Answer(Protocol):
    """What a model says of one text."""

    @property
    def columns(self) -> tuple[str, ...]:
        """What stands before the text in a line of `predict`."""

    @property
    def fields(self) -> dict[str, Any]:
        """What stands beside the text in a line of `predict --json`."""

    @property
    def tested(self) -> dict[str, Any]:
        """What `test_predictions.jsonl` holds of it."""


class Tally(Protocol):
    """Judges answers as they come, in little memory."""

    def add(self, example: Example, answer: Any) -> None:
        """Counts an answer to a labelled example."""

    def sentence(self) -> str:
        """The score so far, such as ``accuracy 0.9000``."""


class Problem(ABC):
    """One of the problems.

    Attributes:
        name: as `--problem` has it.
        head: transformers' name for it, ``problem_type`` in a model's config.
        metrics: the scores, higher is better; the first decides on dev where none is asked for.
    """

    name: ClassVar[str]
    head: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]

    def outputs(self, labels: Sequence[str]) -> int:
        """The width of the model's head."""
        return len(labels)

    @abstractmethod
    def number(self, labels: Sequence[str]) -> Callable[[Example], Any]:
        """What a row of a batch holds as its label, from an example."""

    @abstractmethod
    def batch(self, numbers: Sequence[Any]) -> Tensor:
        """The labels of a batch."""

    @abstractmethod
    def score_logits(self, prediction: Any) -> dict[str, float]:
        """`metrics` of a transformers EvalPrediction, and how many different answers the model
        gives, for `Trainer(compute_metrics=...)`.
        """

    @abstractmethod
    def answers(self, logits: Tensor, labels: Sequence[str]) -> Sequence[Answer]:
        """The model's answers, from its logits [B, C]."""

    @abstractmethod
    def score(
        self, examples: Sequence[Example], answers: Sequence[Any], labels: Sequence[str]
    ) -> dict[str, float]:
        """`metrics` of answers to labelled examples."""

    @abstractmethod
    def tally(self, labels: Sequence[str]) -> Tally:
        """An empty tally."""
