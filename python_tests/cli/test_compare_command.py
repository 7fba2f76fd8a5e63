"""Whole comparisons on a tiny encoder: what they write, how they go on, what they refuse."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from command import Run

SCORES = ("task", "train_examples", "method", "lr", "seed", "dev", "test", "best_step", "steps")


def arguments(model: Path, files: tuple[Path, Path], *more: object) -> list[object]:
    """Two methods with two rates each, with the first 24 rows and with all."""
    return [
        "compare", "--task", f"toy={files[0]}", "--eval", files[1], "--model", model,
        "--methods", "head,lora", "--train-examples", "24,all", "--seeds", "0,1",
        "--lr-factors", "0.3,1", "--epochs", 2, "--batch-size", 8, "--max-length", 16,
        "--device", "cpu", "--dev-examples", 40, *more,
    ]  # fmt: skip


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def scores_in(folder: Path) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in SCORES) for row in rows_in(folder)]


@pytest.fixture(scope="module")
def compared(
    tiny_model: Path, toy_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished comparison in this process; read only."""
    from pelt_kernels.cli import main

    output = tmp_path_factory.mktemp("compared") / "out"
    asked = arguments(tiny_model, toy_files, "--jobs", 1, "--output", output)
    assert main([str(argument) for argument in asked]) == 0
    return output


def test_each_cell_tries_its_rates_and_tests_each_seed_once(compared: Path) -> None:
    rows = rows_in(compared)
    assert len(rows) == 2 * 2 * (1 + 2)
    for count in (24, None):
        for method in ("head", "lora"):
            cell = [r for r in rows if (r["train_examples"], r["method"]) == (count, method)]
            tried = {row["lr"]: row["dev"] for row in cell if row["seed"] == 0}
            tested = [row for row in cell if row["test"]]
            assert sorted(row["seed"] for row in tested) == [0, 1]
            (lr,) = {row["lr"] for row in tested}
            assert tried[lr]["accuracy"] == max(dev["accuracy"] for dev in tried.values())
    assert not (compared / "runs").exists()


def test_the_summary_and_its_tables_hold_the_means(compared: Path) -> None:
    summary = json.loads((compared / "compare.json").read_text())
    (cell,) = (c for c in summary["cells"] if c["method"] == "lora" and c["train_examples"] is None)
    of_rows = [
        row["test"]["accuracy"]
        for row in rows_in(compared)
        if row["method"] == "lora" and row["train_examples"] is None and row["test"]
    ]
    assert cell["mean"] == pytest.approx(sum(of_rows) / 2)
    shown = f"{100 * cell['mean']:.1f} ± {100 * cell['std']:.1f}"
    assert f"| {shown} |" in (compared / "compare.md").read_text()
    assert (compared / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_finished_is_read_and_more_can_be_added(
    compared: Path, run: Run, tiny_model: Path, toy_files: tuple[Path, Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    shutil.copytree(compared, output)
    lines = (output / "results.jsonl").read_text().splitlines(keepends=True)
    (output / "results.jsonl").write_text("".join(lines[:-2]))
    asked = arguments(tiny_model, toy_files, "--jobs", 1, "--output", output)
    outcome = run(*asked)
    assert "2 of 12 runs are left" in outcome.err or "1 of 12 runs are left" in outcome.err
    assert scores_in(output) == scores_in(compared)
    more = run(*[*asked, "--seeds", "0,1,2"])
    assert "4 of 16 runs are left" in more.err
    assert scores_in(output)[:2] == scores_in(compared)[:2]


def test_a_report_sums_up_what_is_finished(compared: Path, run: Run, tmp_path: Path) -> None:
    for name in ("comparison.json", "results.jsonl"):
        shutil.copy(compared / name, tmp_path / name)
    before = json.loads((compared / "compare.json").read_text())
    outcome = run("compare", "--report", "--output", tmp_path)
    assert outcome.code == 0
    assert json.loads((tmp_path / "compare.json").read_text())["cells"] == before["cells"]
    lines = (tmp_path / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_text("".join(lines[:4]))  # one cell and a trial of another
    assert run("compare", "--report", "--output", tmp_path).code == 0
    assert len(json.loads((tmp_path / "compare.json").read_text())["cells"]) == 1
    assert "holds no comparison" in run("compare", "--report", "--output", "absent").refused(2)


def test_a_preset_is_replaced_by_what_is_given(
    run: Run, tiny_model: Path, toy_files: tuple[Path, Path], tmp_path: Path
) -> None:
    asked = arguments(tiny_model, toy_files, "--jobs", 1, "--output", tmp_path / "out")
    assert run(*asked, "--preset", "adamix", "--methods", "head", "--dev-examples", 30).code == 0
    settings = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert settings["weight_decay"] == 0.1 and settings["dev_examples"] == 30
    assert settings["lr_factors"] == [0.3, 1] and settings["methods"] == ["head"]


def test_other_settings_are_refused(
    compared: Path, run: Run, tiny_model: Path, toy_files: tuple[Path, Path]
) -> None:
    asked = arguments(tiny_model, toy_files, "--output", compared)
    assert "epochs: the comparison in" in run(*asked, "--epochs", 3).refused(2)
    assert "begin with that one" in run(*asked, "--seeds", "1,0").refused(2)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--methods", "lora,lorra"), "got 'lorra'"),
        (("--methods", "lora,lora"), "methods: expected different ones"),
        (("--methods", "lora:rank=4"), "rank"),
        (("--train-examples", "24,9999"), "9999 were asked for"),
        (("--train-examples", "few"), "train-examples: expected numbers"),
        (("--lr", "1e-3", "--lr", "lora=1e-3,1e-2"), "as many rates for every method"),
        (("--lr", "adapter=1e-3,1e-2"), "lr: expected a method of --methods"),
        (("--metric", "other=matthews"), "metric: expected the name of a task (toy), got other"),
        (("--metric", "toy=bleu"), "metric: expected one of accuracy"),
        (("--dev-examples", "0"), "expected one rate for each method"),
        (("--jobs", "0"), "jobs: expected 1 or more"),
        (("--eval", "other.tsv"), "eval: expected a test file for each --task"),
    ],
)
def test_wrong_requests_are_refused_in_one_sentence(
    more: tuple[object, ...],
    sentence: str,
    run: Run,
    tiny_model: Path,
    toy_files: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    asked = arguments(tiny_model, toy_files, "--output", tmp_path / "out", *more)
    assert sentence in run(*asked).refused(2)
    assert not (tmp_path / "out").exists()


def test_without_a_dev_part_the_last_step_is_tested(
    run: Run, tiny_model: Path, toy_files: tuple[Path, Path], tmp_path: Path
) -> None:
    asked = arguments(tiny_model, toy_files, "--jobs", 1, "--output", tmp_path / "out")
    assert run(*asked, "--dev-examples", 0, "--lr-factors", 1, "--methods", "head").code == 0
    rows = rows_in(tmp_path / "out")
    assert len(rows) == 4
    assert all(row["dev"] is None and row["test"] for row in rows)
    assert all(row["best_step"] == row["steps"] for row in rows)


def test_a_diverged_rate_is_never_chosen(
    run: Run, tiny_model: Path, toy_files: tuple[Path, Path], tmp_path: Path
) -> None:
    asked = arguments(tiny_model, toy_files, "--jobs", 1, "--output", tmp_path / "out")
    outcome = run(*asked, "--methods", "full", "--train-examples", 24, "--lr", "1e30,1e-4")
    assert outcome.code == 0
    rows = rows_in(tmp_path / "out")
    assert [row["lr"] for row in rows if row["error"]] == [1e30]
    assert {row["lr"] for row in rows if row["test"]} == {1e-4}


def test_ctrl_c_ends_two_processes_and_one_goes_on_to_the_same_scores(
    compared: Path, run: Run, tiny_model: Path, toy_files: tuple[Path, Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"

    def interrupt() -> None:
        results, deadline = output / "results.jsonl", time.monotonic() + 120
        while time.monotonic() < deadline:
            if results.is_file() and len(rows_in(output)) > 6:
                break
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    watching = threading.Thread(target=interrupt)
    watching.start()
    outcome = run(*arguments(tiny_model, toy_files, "--jobs", 2, "--output", output))
    watching.join()
    assert "of 12 runs are finished and kept in" in outcome.refused(130)
    assert not multiprocessing.active_children()
    assert 6 < len(rows_in(output)) < 12
    assert run(*arguments(tiny_model, toy_files, "--jobs", 1, "--output", output)).code == 0
    assert scores_in(output) == scores_in(compared)
