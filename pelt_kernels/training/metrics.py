"""Accuracy, F1 and Matthews' correlation of predicted classes; weights against unequal classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

NAMES = ("accuracy", "f1", "matthews")
CLASSES_ANSWERED = "classes_answered"  # how many different ones the model gave


def score(predicted: np.ndarray, expected: np.ndarray, classes: int) -> dict[str, float]:
    """The three figures. F1 is that of the second class where there are two, the mean over classes
    otherwise.
    """
    if classes == 2:
        f1 = f1_score(expected, predicted, pos_label=1, average="binary", zero_division=0.0)
    else:
        f1 = f1_score(
            expected, predicted, labels=range(classes), average="macro", zero_division=0.0
        )
    return {
        "accuracy": float(accuracy_score(expected, predicted)),
        "f1": float(f1),
        "matthews": float(matthews_corrcoef(expected, predicted)),
    }


def score_logits(prediction: Any) -> dict[str, float]:
    """`score` of a transformers EvalPrediction, and how many classes the model answers with, for
    `Trainer(compute_metrics=...)`.
    """
    logits = prediction.predictions
    predicted = logits.argmax(axis=-1)
    scores = score(predicted, prediction.label_ids, logits.shape[-1])
    return scores | {CLASSES_ANSWERED: len(np.unique(predicted))}


def balanced_weights(numbers: Sequence[int], classes: int) -> list[float]:
    """``w_c = n / (C n_c)``: the weight of each class's examples in the loss, by which all classes
    weigh the same in sum and the mean weight of an example is 1.

    Args:
        numbers: the class of each training example.

    Raises:
        ValueError: a class without an example.
    """
    counts = np.bincount(numbers, minlength=classes)
    if not counts.all():
        raise ValueError(f"expected examples of every class, got {counts.tolist()} of them")
    return [float(weight) for weight in len(numbers) / (classes * counts)]


def summarise(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation (n - 1; 0 for one value)."""
    return {
        "mean": float(np.mean(values)),
        "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
    }
