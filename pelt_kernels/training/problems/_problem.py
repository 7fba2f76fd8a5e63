"""What every problem gives to a run and to `predict`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
from torch import Tensor

from ..base_model import empty_classifier, load_classifier, load_tokenizer
from ..encode import Encoded, Form, Pad, encode
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
        metrics: the scores, higher is better; the first decides on dev where none is asked for.
    """

    name: ClassVar[str]
    metrics: ClassVar[tuple[str, ...]]

    @abstractmethod
    def load(self, model: str, labels: Sequence[str]) -> Any:
        """The base model of a name with the head that the problem needs."""

    @abstractmethod
    def empty(self, model: str, labels: Sequence[str]) -> Any | None:
        """The same without weights; None for a model that has no such head."""

    @abstractmethod
    def tokenizer(self, model: str) -> Any:
        """The tokenizer of a model."""

    @abstractmethod
    def encoded(self, examples: Sequence[Example], form: Form) -> Encoded:
        """Labelled examples as rows of batches."""

    @abstractmethod
    def collator(self, form: Form) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """What makes batches of the rows."""

    @abstractmethod
    def score(
        self, examples: Sequence[Example], answers: Sequence[Any], labels: Sequence[str]
    ) -> dict[str, float]:
        """`metrics` of answers to labelled examples."""

    @abstractmethod
    def tally(self, labels: Sequence[str]) -> Tally:
        """An empty tally."""


class HeadProblem(Problem):
    """A problem whose answer is the output of a head for a whole text.

    Attributes:
        head: transformers' name for it, ``problem_type`` in a model's config.
    """

    head: ClassVar[str]

    def load(self, model: str, labels: Sequence[str]) -> Any:
        return load_classifier(model, self.outputs(labels), self.head)

    def empty(self, model: str, labels: Sequence[str]) -> Any | None:
        return empty_classifier(model, self.outputs(labels), self.head)

    def tokenizer(self, model: str) -> Any:
        return load_tokenizer(model)

    def encoded(self, examples: Sequence[Example], form: Form) -> Encoded:
        number = self.number(form.labels)
        return encode(examples, form.tokenizer, form.max_length, number, form.conditions)

    def collator(self, form: Form) -> Pad:
        return Pad(form.tokenizer, self.batch)

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
    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The loss [B] of each row, whose mean is the model's, from logits [B, C] in float32 and
        labels as `batch` makes them.
        """

    @abstractmethod
    def confidence(self, logits: Tensor) -> Tensor | None:
        """The probability [B] that the model gives its answers; None where it gives none."""

    @abstractmethod
    def right(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray | None:
        """Which answers [B] are right, whose mean is the accuracy; None where a score is no mean
        over rows.
        """
