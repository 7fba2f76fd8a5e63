"""How far an altered model is from the untouched one on the same rows, and what of that is noise.

Rows are drawn anew with replacement, the same for both models (a paired bootstrap). An interval of
95 % is that of one difference alone. As many are looked at, a difference counts as an effect only
where an interval that holds for all of them at once leaves out 0: the largest studentised deviation
of a draw among all differences is below its bound in 95 % of the draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .measure import Outcome

DRAWS = 2000
SLOW_DRAWS = 300  # of a score that is no mean over rows and is computed anew for each
SEED = 1
COVERAGE = 0.95
ROUNDING = 1e-5  # a difference of a mean that altered gates may make without altering anything
_CHUNK = 2**22  # counts of rows that are drawn together


@dataclass(frozen=True)
class Difference:
    """Of a figure from the untouched model's: the value, its interval, and whether it is more than
    noise among all that were looked at.
    """

    value: float
    interval: tuple[float, float]
    is_effect: bool


def differences(
    untouched: Outcome, altered: Sequence[Outcome], metric: str
) -> list[tuple[Difference, Difference]]:
    """Of the metric and of the loss, for each altered outcome."""
    by_loss = np.stack([outcome.loss - untouched.loss for outcome in altered], axis=1)
    right = [outcome.right for outcome in (untouched, *altered)]
    if metric == "accuracy" and all(each is not None for each in right):
        first, *others = (np.asarray(each, dtype=float) for each in right)
        by_metric = np.stack([other - first for other in others], axis=1)
        scores = _of_means(by_metric)
    else:
        scores = _of_scores(untouched, altered, metric)
    return list(zip(scores, _of_means(by_loss), strict=True))


def _of_means(by_row: np.ndarray) -> list[Difference]:
    """Of the means of differences by row [n, J]."""
    n = len(by_row)
    draw = np.random.default_rng(SEED)
    at_once = max(1, _CHUNK // n)
    means = []
    for start in range(0, DRAWS, at_once):
        count = min(at_once, DRAWS - start)
        means.append(draw.multinomial(n, np.full(n, 1 / n), size=count) @ by_row / n)
    return _judged(by_row.mean(axis=0), np.concatenate(means))


def _of_scores(untouched: Outcome, altered: Sequence[Outcome], metric: str) -> list[Difference]:
    def of(rows: np.ndarray) -> list[float]:
        first = untouched.score(metric, rows)
        return [outcome.score(metric, rows) - first for outcome in altered]

    n = len(untouched.loss)
    draw = np.random.default_rng(SEED)
    drawn = np.array([of(draw.integers(n, size=n)) for _ in range(SLOW_DRAWS)])
    return _judged(np.array(of(np.arange(n))), drawn)


def _judged(values: np.ndarray, drawn: np.ndarray) -> list[Difference]:
    """From the differences [J] and those of each draw [draws, J]."""
    tail = 100 * (1 - COVERAGE) / 2
    low, high = np.percentile(drawn, [tail, 100 - tail], axis=0)
    errors = drawn.std(axis=0)
    varies = errors > 0
    largest = (np.abs(drawn - values)[:, varies] / errors[varies]).max(axis=1, initial=0.0)
    bound = np.percentile(largest, 100 * COVERAGE)
    is_effect = varies & (np.abs(values) > np.maximum(bound * errors, ROUNDING))
    return [
        Difference(float(value), (float(least), float(most)), bool(effect))
        for value, least, most, effect in zip(values, low, high, is_effect, strict=True)
    ]
