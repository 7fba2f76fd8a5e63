"""What the rows of a comparison say together: means, the upper bound of single methods, and
whether a difference is more than chance.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from scipy.stats import permutation_test

from ..metrics import summarise
from .protocol import SINGLE_METHODS, Cell, Comparison
from .rows import Key, Row

UPPER_BOUND = "upper bound"  # the best of SINGLE_METHODS on each task
TESTED_AGAINST = ("lora", UPPER_BOUND)
RESAMPLES, LEVEL = 9999, 0.05
Scores = dict[str, float]  # by seed
Table = dict[Cell, Scores]


def cells_of(
    comparison: Comparison,
    rows: Mapping[Key, Row],
    chosen: Mapping[Cell, float | None],
) -> Iterator[dict[str, Any]]:
    """For each task, K and method with a tested run: the rate, the scores by seed, their mean and
    deviation, how many of its runs diverged or kept a model of one answer, and what all cost.
    """
    for cell, lr in chosen.items():
        task, count, method = cell
        own = [row for key, row in rows.items() if key[:3] == cell]
        keys = [(task, count, method, lr, seed) for seed in comparison.seeds]
        found = [rows[key] for key in keys if key in rows and rows[key]["test"]]
        if not found:
            continue
        metric = found[0]["metric"]
        scores = {str(row["seed"]): row["test"][metric] for row in found}
        yield {
            "task": task,
            "train_examples": count,
            "method": method,
            "metric": metric,
            "lr": lr,
            "scores": scores,
            **summarise(list(scores.values())),
            "steps": [row["steps"] for row in found],
            "dev_examples": found[0]["dev_examples"],
            "test_examples": found[0]["test_examples"],
            "diverged": sum(row["error"] is not None for row in own),
            "constant": sum(bool(row["notes"]) for row in found),
            "processor_seconds": sum(row["processor_seconds"] for row in own),
        }


def summed_up(cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What cells say together; tasks, sizes and methods in the order in which they come."""
    table: Table = {
        (cell["task"], cell["train_examples"], cell["method"]): dict(cell["scores"])
        for cell in cells
    }
    tasks = _different(cell["task"] for cell in cells)
    counts = _different(cell["train_examples"] for cell in cells)
    methods = _different(cell["method"] for cell in cells)
    bounds = _with_upper_bounds(table, tasks, counts)
    columns = [*methods, *([UPPER_BOUND] if bounds else [])]
    return {
        "tasks": tasks,
        "methods": methods,
        "train_examples": counts,
        "seeds": _different(seed for cell in cells for seed in cell["scores"]),
        "metrics": {cell["task"]: cell["metric"] for cell in cells},
        "upper_bounds": bounds,
        "averages": list(_averages(table, tasks, counts, columns)),
        "tests": list(_tests(table, tasks, counts, methods)),
    }


def _different(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def _with_upper_bounds(
    table: Table, tasks: Sequence[str], counts: Sequence[int | None]
) -> list[dict[str, Any]]:
    """Adds the column `UPPER_BOUND` where all single methods are finished: the scores of the one
    with the best mean on the task. It is chosen on the test part, which favours the bound.
    """
    found = []
    for count in counts:
        for task in tasks:
            single = {m: table.get((task, count, m), {}) for m in SINGLE_METHODS}
            if not all(single.values()):
                continue
            best = max(single, key=lambda method: fmean(single[method].values()))
            table[task, count, UPPER_BOUND] = single[best]
            spread = summarise(list(single[best].values()))
            found.append({"task": task, "train_examples": count, "method": best, **spread})
    return found


def _averages(
    table: Table, tasks: Sequence[str], counts: Sequence[int | None], methods: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The mean over tasks of each seed, and its spread over seeds, where every task has all."""
    wanted = {seed for found in table.values() for seed in found}
    for count in counts:
        for method in methods:
            scores = [table.get((task, count, method), {}) for task in tasks]
            if all(wanted == set(found) for found in scores):
                means = [fmean(found[seed] for found in scores) for seed in scores[0]]
                yield {"train_examples": count, "method": method, **summarise(means)}


def _tests(
    table: Table, tasks: Sequence[str], counts: Sequence[int | None], methods: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """UniPELT's variants against `TESTED_AGAINST`, for each K and over all of them."""
    sizes = [[count] for count in counts] + ([list(counts)] if len(counts) > 1 else [])
    for method in methods:
        if not method.startswith("unipelt"):
            continue
        for other in TESTED_AGAINST:
            for of in sizes:
                differences = _differences(table, tasks, of, method, other)
                if len(differences) > 1:
                    compared = compared_in_pairs(differences)
                    yield {"method": method, "against": other, "train_examples": of, **compared}


def _differences(
    table: Table, tasks: Sequence[str], counts: Sequence[int | None], method: str, other: str
) -> list[float]:
    """Score minus score, of the same task, training rows and seed."""
    pairs = (
        (table.get((task, count, method), {}), table.get((task, count, other), {}))
        for count in counts
        for task in tasks
    )
    return [one[seed] - two[seed] for one, two in pairs for seed in one if seed in two]


def compared_in_pairs(differences: Sequence[float]) -> dict[str, Any]:
    """The mean of differences, and p: the share of their changes of sign that give a mean as far
    from 0, of all of them where there are few pairs, else of `RESAMPLES` draws with a fixed seed.
    """
    values = np.array(differences)
    p = 1.0
    if values.any():
        p = permutation_test(
            (values,),
            lambda sample, axis: sample.mean(axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=RESAMPLES,
            rng=np.random.default_rng(0),
        ).pvalue
    mean = float(values.mean())
    verdict = "no difference shown" if p >= LEVEL else ("higher" if mean > 0 else "lower")
    return {"mean": mean, "pairs": len(values), "p": float(p), "verdict": verdict}
