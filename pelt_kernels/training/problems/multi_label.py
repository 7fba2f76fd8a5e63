"""Any number of labels for each text, each of them right or not by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from ..metrics import ANSWERS, SET_SCORES, set_scores
from ..tasks import MULTI_LABEL, Example
from ._problem import HeadProblem

THRESHOLD = 0.5  # the probability from which a label is given


@dataclass(frozen=True)
class LabelSet:
    """The labels of a text, those of a probability of THRESHOLD or more, and the probability of
    each.
    """

    labels: tuple[str, ...]
    probabilities: dict[str, float]

    @property
    def columns(self) -> tuple[str, ...]:
        return (
            ",".join(self.labels),
            ",".join(f"{self.probabilities[label]:.4f}" for label in self.labels),
        )

    @property
    def fields(self) -> dict[str, Any]:
        return {"labels": list(self.labels), "probabilities": self.probabilities}

    @property
    def tested(self) -> dict[str, Any]:
        return {"predicted": list(self.labels)}


class MultiLabel(HeadProblem):
    """The binary cross-entropy of a sigmoid for each label."""

    name = MULTI_LABEL
    head = "multi_label_classification"
    metrics = SET_SCORES

    def number(self, labels: Sequence[str]) -> Callable[[Example], list[float]]:
        def indicators(example: Example) -> list[float]:
            given = set(example.label or ())
            return [float(label in given) for label in labels]

        return indicators

    def batch(self, numbers: Sequence[list[float]]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float32)

    def score_logits(self, prediction: Any) -> dict[str, float]:
        predicted = prediction.predictions >= 0  # where a sigmoid is one half
        scores = set_scores(predicted, prediction.label_ids > 0)
        return scores | {ANSWERS: len(np.unique(predicted, axis=0))}

    def answers(self, logits: Tensor, labels: Sequence[str]) -> list[LabelSet]:
        made = []
        for row in logits.sigmoid().tolist():
            given = tuple(label for label, p in zip(labels, row, strict=True) if p >= THRESHOLD)
            made.append(LabelSet(given, dict(zip(labels, row, strict=True))))
        return made

    def score(
        self, examples: Sequence[Example], answers: Sequence[LabelSet], labels: Sequence[str]
    ) -> dict[str, float]:
        predicted = [[label in answer.labels for label in labels] for answer in answers]
        expected = [[label in (example.label or ()) for label in labels] for example in examples]
        return set_scores(np.array(predicted), np.array(expected))

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        by_label = binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return by_label.mean(dim=-1)

    def confidence(self, logits: Tensor) -> Tensor:
        """The mean over the labels: of a label that is not given, the probability that it is not
        one of them.
        """
        return logits.abs().sigmoid().mean(dim=-1)

    def right(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        found: np.ndarray = ((logits >= 0) == (labels > 0)).all(axis=-1)
        return found

    def tally(self, labels: Sequence[str]) -> _SetCounts:
        return _SetCounts()


@dataclass
class _SetCounts:
    count: int = 0
    whole: int = 0
    given: int = 0
    expected: int = 0
    right: int = 0

    def add(self, example: Example, answer: LabelSet) -> None:
        expected, given = set(example.label or ()), set(answer.labels)
        self.count += 1
        self.whole += expected == given
        self.given += len(given)
        self.expected += len(expected)
        self.right += len(expected & given)

    def sentence(self) -> str:
        f1 = 2 * self.right / max(1, self.given + self.expected)
        return f"micro F1 {f1:.4f}, all labels right {self.whole / self.count:.4f}"
