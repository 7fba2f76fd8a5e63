"""The parts of a comparison: which rows it draws, its presets, what it says of scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pelt_kernels.training import UsageError, load_task
from pelt_kernels.training.compare import Comparison, Source
from pelt_kernels.training.compare.comparison import chosen_rate
from pelt_kernels.training.compare.parameters import stored_parameters
from pelt_kernels.training.compare.presets import PRESETS, preset
from pelt_kernels.training.compare.runs import Runner, split
from pelt_kernels.training.compare.summary import UPPER_BOUND, compared_in_pairs, summed_up
from pelt_kernels.training.compare.tables import tables

FILES = tuple[Path, Path]


def test_few_examples_lie_inside_more_and_dev_comes_next(toy_files: FILES) -> None:
    task = load_task(str(toy_files[0]), str(toy_files[1]))
    few, more = split(task, 20, 42, 1000), split(task, 60, 42, 50)
    assert more.train[:20] == few.train
    drawn = {example.content for example in few.train}
    assert drawn.isdisjoint(example.content for example in few.dev)
    assert set(few.dev) | set(few.train) <= set(task.train)
    assert len(more.dev) == 50 and few.test == more.test == task.test
    assert split(task, 20, 43, 1000).train != few.train
    assert split(task, None, 42, 1000) == task


def test_too_many_examples_are_refused(toy_files: FILES) -> None:
    task = load_task(str(toy_files[0]), str(toy_files[1]))
    with pytest.raises(UsageError, match="200 were asked for"):
        split(task, 200, 42, 10)


def test_rates_are_the_recipes_with_as_many_for_each() -> None:
    comparison = Comparison()
    comparison.check()
    assert comparison.rates("lora") == (6e-4, 2e-3, 6e-3)
    assert comparison.rates("pst:sparsity=0.5") == (9e-5, 3e-4, 9e-4)
    given = Comparison(methods=("lora", "lora:r=4"), lr={"": (1e-3,), "lora:r=4": (1e-2,)})
    assert (given.rates("lora"), given.rates("lora:r=4")) == ((1e-3,), (1e-2,))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_comparison_that_can_be_made(name: str) -> None:
    sources = (Source("glue/cola", "glue/cola"), Source("mine", "mine.csv"))
    values = preset(name, sources)
    assert values["metrics"] == {"glue/cola": "matthews"}
    comparison = Comparison(tasks=sources, **values)
    comparison.check()
    assert Comparison.restored(comparison.stored()) == comparison


def test_the_best_rate_on_dev_is_chosen_and_none_that_diverged() -> None:
    def row(score: float, loss: float, error: str | None = None) -> dict[str, Any]:
        dev = None if error else {"accuracy": score, "loss": loss}
        return {"metric": "accuracy", "dev": dev, "error": error}

    cell = ("toy", 24, "lora")
    rows = {
        (*cell, 1e-4, 0): row(0.8, 0.5),
        (*cell, 1e-3, 0): row(0.8, 0.4),
        (*cell, 1e-2, 0): row(0.0, 0.0, "the loss is nan"),
    }
    rates = (1e-4, 1e-3, 1e-2)
    assert chosen_rate(rates, 0, cell, rows) == 1e-3
    assert chosen_rate((*rates, 1.0), 0, cell, rows) is None  # one is not tried yet
    assert chosen_rate((1e-2, 1e-2), 0, cell, rows) is None


def _cells(scores: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """Of tasks and methods, a score for each seed."""
    return [
        {
            "task": task,
            "train_examples": 100,
            "method": method,
            "metric": "accuracy",
            "scores": {str(seed): value for seed, value in enumerate(values)},
            "mean": sum(values) / len(values),
            "std": 0.0,
        }
        for task, methods in scores.items()
        for method, values in methods.items()
    ]


def test_averages_and_the_upper_bound_of_single_methods() -> None:
    found = summed_up(
        _cells(
            {
                "one": {"adapter": [0.6, 0.8], "prefix": [0.5, 0.5], "lora": [0.4, 0.4]},
                "two": {"adapter": [0.2, 0.2], "prefix": [0.3, 0.3], "lora": [0.6, 0.4]},
            }
        )
    )
    assert [bound["method"] for bound in found["upper_bounds"]] == ["adapter", "lora"]
    averages = {row["method"]: row for row in found["averages"]}
    assert averages["adapter"]["mean"] == pytest.approx(0.45)
    assert averages["adapter"]["std"] == pytest.approx(0.1 / 2**0.5)  # of 0.4 and 0.5
    assert averages[UPPER_BOUND]["mean"] == pytest.approx((0.7 + 0.5) / 2)


def test_an_average_waits_for_all_seeds_of_all_tasks() -> None:
    cells = _cells({"one": {"lora": [0.5, 0.7]}, "two": {"lora": [0.5]}})
    assert summed_up(cells)["averages"] == []
    assert summed_up(cells[:1])["averages"][0]["mean"] == pytest.approx(0.6)


def test_a_difference_is_said_only_where_signs_show_it() -> None:
    assert compared_in_pairs([0.01] * 3)["p"] == pytest.approx(2 / 8)
    assert compared_in_pairs([0.01] * 3)["verdict"] == "no difference shown"
    assert compared_in_pairs([0.01] * 12) == {
        "mean": pytest.approx(0.01), "pairs": 12, "p": pytest.approx(2 / 2**12),
        "verdict": "higher",
    }  # fmt: skip
    assert compared_in_pairs([-0.02] * 6)["verdict"] == "lower"
    assert compared_in_pairs([0.03, -0.03, 0.01, -0.02, 0.02, -0.01])["p"] == 1
    assert compared_in_pairs([0.0, 0.0])["p"] == 1


def test_unipelt_is_compared_in_pairs_of_task_and_seed() -> None:
    scores = {
        task: {
            "adapter": [0.5, 0.5, 0.5], "prefix": [0.5, 0.5, 0.5], "lora": [0.6, 0.5, 0.4],
            "unipelt": [0.7, 0.6, 0.5],
        }
        for task in ("one", "two")
    }  # fmt: skip
    found = {test["against"]: test for test in summed_up(_cells(scores))["tests"]}
    assert found["lora"]["verdict"] == "higher" and found["lora"]["pairs"] == 6
    assert found["lora"]["mean"] == pytest.approx(0.1)
    assert found[UPPER_BOUND]["pairs"] == 6


def test_stored_parameters_leave_out_what_only_training_needs(
    tiny_model: Path, toy_files: FILES
) -> None:
    source = Source("toy", str(toy_files[0]), str(toy_files[1]))
    options = ("prefix:prefix_length=3", "adamix", "lora")
    runner = Runner(Comparison((source,), options, model=str(tiny_model)), Path("unused"))
    prefix, adamix, lora = (stored_parameters(runner, method) for method in options)
    head = 32 * 2 + 2
    assert prefix["stored"] == 2 * 2 * 3 * 32 + head < prefix["trained"]
    assert adamix["stored"] < adamix["trained"]
    assert lora["stored"] == lora["trained"] < lora["base"]


def test_tables_have_sizes_as_rows_and_methods_as_columns() -> None:
    cells = _cells({"one": {"lora": [0.5], "full": [0.25]}})
    cells = [cell | {"processor_seconds": 1.0} for cell in cells]
    counts = {"trained": 10, "stored": 5, "base": 100}
    parameters = {"lora": counts, "full": counts}
    shown = list(tables(summed_up(cells) | {"cells": cells, "parameters": parameters}))
    assert [table.title for table in shown] == ["one, accuracy", "cost"]
    assert shown[0].columns == ["K", "lora", "full"]
    assert shown[0].rows == [["100", "50.0", "25.0"]]
