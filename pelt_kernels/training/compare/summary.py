"""What the rows of a comparison say together: means, the upper bound of single methods, and
whether a difference is more than chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from scipy.stats import permutation_test

from ..._hardware import hardware
from ..metrics import summarise
from ..report import versions
from .protocol import SINGLE_METHODS, Comparison
from .rows import Key, Row

UPPER_BOUND = "upper bound"  # the best of SINGLE_METHODS on each task
TESTED_AGAINST = ("lora", UPPER_BOUND)
RESAMPLES, LEVEL = 9999, 0.05
Scores = dict[int, float]  # by seed
Table = dict[tuple[str, int | None, str], Scores]


def summarised(
    comparison: Comparison,
    rows: Mapping[Key, Row],
    chosen: Mapping[tuple[str, int | None, str], float | None],
    parameters: Mapping[str, Mapping[str, int]],
) -> dict[str, Any]:
    """What `compare.json` holds, of the runs that are finished."""
    table: Table = {}
    cells = []
    metrics: dict[str, str] = {}
    for cell, lr in chosen.items():
        keys = [(*cell, lr, seed) for seed in comparison.seeds]
        found = {key[4]: rows[key] for key in keys if key in rows and rows[key]["is_tested"]}
        for row in found.values():
            metrics[cell[0]] = row["metric"]
        table[cell] = {s: r["test"][r["metric"]] for s, r in found.items() if r["test"]}
        task, count, method = cell
        own = [row for key, row in rows.items() if key[:3] == cell]
        cells.append(
            {
                "task": task,
                "train_examples": count,
                "method": method,
                "lr": lr,
                "scores": table[cell],
                **(summarise(list(table[cell].values())) if table[cell] else {}),
                "diverged": sum(row["error"] is not None for row in own),
                "constant": sum(bool(row["notes"]) for row in found.values() if not row["error"]),
                "processor_seconds": sum(row["processor_seconds"] for row in own),
            }
        )
    tasks = [source.name for source in comparison.tasks]
    bounds = _with_upper_bounds(table, tasks, comparison.train_examples)
    columns = [*comparison.methods, *([UPPER_BOUND] if bounds else [])]
    return {
        "tasks": tasks,
        "methods": list(comparison.methods),
        "train_examples": list(comparison.train_examples),
        "seeds": list(comparison.seeds),
        "metrics": metrics,
        "cells": cells,
        "upper_bounds": bounds,
        "averages": [
            {"train_examples": count, "method": method, **average}
            for count in comparison.train_examples
            for method in columns
            if (average := _average(table, tasks, count, method))
        ],
        "tests": _tests(table, tasks, comparison.train_examples, comparison.methods),
        "parameters": {name: dict(counts) for name, counts in parameters.items()},
        "hardware": hardware(),
        "versions": versions(),
    }


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
            mean = fmean(single[best].values())
            found.append({"task": task, "train_examples": count, "method": best, "mean": mean})
    return found


def _average(table: Table, tasks: Sequence[str], count: int | None, method: str) -> dict[str, Any]:
    """The mean over tasks of each seed, and its spread over seeds; nothing before every task has
    it.
    """
    scores = [table.get((task, count, method), {}) for task in tasks]
    seeds = [seed for seed in scores[0] if all(seed in found for found in scores)]
    if not seeds:
        return {}
    return {**summarise([fmean(found[seed] for found in scores) for seed in seeds])}


def _tests(
    table: Table, tasks: Sequence[str], counts: Sequence[int | None], methods: Sequence[str]
) -> list[dict[str, Any]]:
    """UniPELT's variants against `TESTED_AGAINST`, for each K and over all of them."""
    made = []
    for method in (name for name in methods if name.partition(":")[0].startswith("unipelt")):
        for other in TESTED_AGAINST:
            for of in (*([count] for count in counts), counts):
                differences = _differences(table, tasks, of, method, other)
                if len(differences) > 1 and (len(of) == 1 or len(counts) > 1):
                    sizes = list(of)
                    made.append(
                        {"method": method, "against": other, "train_examples": sizes}
                        | _compared(differences)
                    )
    return made


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


def _compared(differences: Sequence[float]) -> dict[str, Any]:
    """The mean difference, and the share of sign changes that give one as large: exact for few
    pairs, else of `RESAMPLES` draws with a fixed seed.
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
    return {"mean": mean, "pairs": len(differences), "p": float(p), "verdict": verdict}
