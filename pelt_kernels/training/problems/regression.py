"""One number for each text, such as the likeness of two sentences."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..metrics import ANSWERS, CORRELATIONS, correlations
from ..tasks import REGRESSION, Example
from ..tasks.labels import score_of
from ._problem import HeadProblem


@dataclass(frozen=True)
class Score:
    """The number that a model gives a text."""

    score: float

    @property
    def columns(self) -> tuple[str, ...]:
        return (f"{self.score:.4f}",)

    @property
    def fields(self) -> dict[str, Any]:
        return {"score": self.score}

    @property
    def tested(self) -> dict[str, Any]:
        return {"predicted": self.score}


class Regression(HeadProblem):
    """The mean squared error of one output, in the units of the labels."""

    name = REGRESSION
    head = "regression"
    metrics = CORRELATIONS

    def outputs(self, labels: Sequence[str]) -> int:
        return 1

    def number(self, labels: Sequence[str]) -> Callable[[Example], float]:
        return score_of

    def batch(self, numbers: Sequence[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float32)

    def score_logits(self, prediction: Any) -> dict[str, float]:
        predicted = prediction.predictions.reshape(-1)
        scores = correlations(predicted, prediction.label_ids.reshape(-1))
        return scores | {ANSWERS: len(np.unique(predicted))}

    def answers(self, logits: Tensor, labels: Sequence[str]) -> list[Score]:
        return [Score(value) for value in logits[:, 0].tolist()]

    def score(
        self, examples: Sequence[Example], answers: Sequence[Score], labels: Sequence[str]
    ) -> dict[str, float]:
        predicted = np.array([answer.score for answer in answers])
        return correlations(predicted, np.array([score_of(example) for example in examples]))

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (logits[:, 0] - labels).square()

    def confidence(self, logits: Tensor) -> None:
        return None

    def right(self, logits: np.ndarray, labels: np.ndarray) -> None:
        return None

    def tally(self, labels: Sequence[str]) -> _Pairs:
        return _Pairs()


@dataclass
class _Pairs:
    """A rank correlation needs all numbers: 16 bytes a row."""

    predicted: array[float] = field(default_factory=lambda: array("d"))
    expected: array[float] = field(default_factory=lambda: array("d"))

    def add(self, example: Example, answer: Score) -> None:
        self.predicted.append(answer.score)
        self.expected.append(score_of(example))

    def sentence(self) -> str:
        found = correlations(np.array(self.predicted), np.array(self.expected))
        return ", ".join(f"{name.capitalize()} {value:.4f}" for name, value in found.items())
