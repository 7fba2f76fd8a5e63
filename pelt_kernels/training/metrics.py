"""Scores of predicted classes, numbers and sets of labels; weights against unequal classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

NAMES = ("accuracy", "f1", "matthews")
CORRELATIONS = ("spearman", "pearson")
SET_SCORES = ("f1_micro", "f1_macro", "accuracy")
ANSWERS = "classes_answered"  # how many different answers the model gave


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


def correlations(predicted: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Spearman's and Pearson's correlation of numbers; 0 where they are all equal on one side, or
    where there is one only, and a correlation is undefined.
    """
    if len(predicted) < 2 or np.ptp(predicted) == 0 or np.ptp(expected) == 0:
        return dict.fromkeys(CORRELATIONS, 0.0)
    return {
        "spearman": float(spearmanr(predicted, expected).statistic),
        "pearson": float(pearsonr(predicted, expected).statistic),
    }


def set_scores(predicted: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Of booleans [rows, labels]: F1 over all labels together and the mean of each label's, and the
    share of rows all of whose labels are right.
    """
    return {
        "f1_micro": float(f1_score(expected, predicted, average="micro", zero_division=0.0)),
        "f1_macro": float(f1_score(expected, predicted, average="macro", zero_division=0.0)),
        "accuracy": float((predicted == expected).all(axis=1).mean()),
    }


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
