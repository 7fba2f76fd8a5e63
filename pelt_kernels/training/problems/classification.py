"""One class for each text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..metrics import ANSWERS, NAMES, score
from ..tasks import CLASSIFICATION, Example
from ._problem import HeadProblem


@dataclass(frozen=True)
class Prediction:
    """The most probable label of a text, and the probability of each."""

    label: str
    probability: float
    probabilities: dict[str, float]

    @property
    def columns(self) -> tuple[str, ...]:
        return self.label, f"{self.probability:.4f}"

    @property
    def fields(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "probability": self.probability,
            "probabilities": self.probabilities,
        }

    @property
    def tested(self) -> dict[str, Any]:
        return {"predicted": self.label, "probability": self.probability}


class Classification(HeadProblem):
    """The cross-entropy of a softmax over the classes."""

    name = CLASSIFICATION
    head = "single_label_classification"
    metrics = NAMES

    def number(self, labels: Sequence[str]) -> Callable[[Example], int]:
        numbers = {label: number for number, label in enumerate(labels)}
        return lambda example: numbers[str(example.label)]

    def batch(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers)

    def score_logits(self, prediction: Any) -> dict[str, float]:
        logits = prediction.predictions
        predicted = logits.argmax(axis=-1)
        scores = score(predicted, prediction.label_ids, logits.shape[-1])
        return scores | {ANSWERS: len(np.unique(predicted))}

    def answers(self, logits: Tensor, labels: Sequence[str]) -> list[Prediction]:
        made = []
        for row in logits.softmax(dim=-1).tolist():
            best = max(range(len(row)), key=row.__getitem__)
            made.append(Prediction(labels[best], row[best], dict(zip(labels, row, strict=True))))
        return made

    def score(
        self, examples: Sequence[Example], answers: Sequence[Prediction], labels: Sequence[str]
    ) -> dict[str, float]:
        numbers = {label: number for number, label in enumerate(labels)}
        predicted = np.array([numbers[answer.label] for answer in answers])
        expected = np.array([numbers[str(example.label)] for example in examples])
        return score(predicted, expected, len(labels))

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels, reduction="none")

    def confidence(self, logits: Tensor) -> Tensor:
        return logits.softmax(dim=-1).amax(dim=-1)

    def right(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        found: np.ndarray = logits.argmax(axis=-1) == labels
        return found

    def tally(self, labels: Sequence[str]) -> _Accuracy:
        return _Accuracy()


@dataclass
class _Accuracy:
    count: int = 0
    right: int = 0

    def add(self, example: Example, answer: Prediction) -> None:
        self.count += 1
        self.right += example.label == answer.label

    def sentence(self) -> str:
        return f"accuracy {self.right / self.count:.4f}"
