"""Two processes that a launcher starts train as one would, stop together and go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import process_runs
import pytest
import torch
from safetensors.torch import load_file

from pelt_kernels.training import experiment_run, train
from pelt_kernels.training.encode import LengthGroups, Shares

RUNS = Path(process_runs.__file__)


@pytest.fixture(scope="module")
def inputs(tiny_model: Path, toy_files: tuple[Path, Path], tmp_path_factory: Any) -> list[Path]:
    """The tiny encoder without dropout, of which each process has its own, and the files."""
    folder = tmp_path_factory.mktemp("without-dropout")
    for path in tiny_model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return [folder, *toy_files]


@pytest.fixture(scope="module")
def together(inputs: list[Path], tmp_path_factory: Any) -> Path:
    """What the two processes wrote, which all tests here read."""
    folder: Path = tmp_path_factory.mktemp("together")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    command += ["--dynamo_backend", "no", "--main_process_port", "0", str(RUNS)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *map(str, inputs), str(folder)],
        env=environment, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def seen_by(process: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"seen-{process}.json").read_text())
    return found


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "pelt_model.safetensors")


@pytest.mark.parametrize("name", ["lora", "unipelt"])
def test_a_run_of_two_processes_is_that_of_one(
    name: str, inputs: list[Path], together: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment_run, "LEAST_STEPS_BETWEEN_EVALUATIONS", 1)
    alone = train(process_runs.config_of(name, *inputs), tmp_path)
    shared = json.loads((together / name / "metrics.json").read_text())
    assert (alone["processes"], shared["processes"]) == (1, 2)
    assert shared["learning_rate"] == alone["learning_rate"]
    for seed in range(len(alone["seeds"])):
        for key in ("dev_accuracy", "best_step", "steps", "accuracy"):
            assert shared["seeds"][seed][key] == alone["seeds"][seed][key], (seed, key)
        losses = [run["seeds"][seed]["dev_loss"] for run in (shared, alone)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    expected = weights_of(tmp_path)
    for key, value in weights_of(together / name).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-4, msg=key)


def test_every_process_is_told_the_same(together: Path) -> None:
    first, second = (seen_by(number, together) for number in range(2))
    said = [seen.pop("said") for seen in (first, second)]
    assert first == second
    assert said[0] and not said[1], "only the main process speaks"
    assert first["adamix"]["seeds"][0]["steps"] == 6
    assert "a multiple of 2" in first["refused"] and "got 9" in first["refused"]
    assert not (together / "odd").exists()


def test_a_signal_to_one_process_stops_both_and_the_run_goes_on(together: Path) -> None:
    assert seen_by(0, together)["interrupted"] == signal.SIGTERM
    whole, resumed = weights_of(together / process_runs.STOPPED), weights_of(together / "stopped")
    assert set(whole) == set(resumed)
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_the_shares_are_the_batches() -> None:
    lengths = [3, 9, 4, 4, 7, 2, 8, 5, 6, 1, 2]
    order = [list(LengthGroups(lengths, 4, 0))[at : at + 4] for at in (0, 4, 8)]
    shares = [list(Shares(LengthGroups(lengths, 4, 0), 4, process, 2)) for process in range(2)]
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == [sorted(b) for b in order]
    assert all(1 <= len(rows) <= 2 for share in shares for rows in share)
    # One row for four processes: each has it, so that each takes the step.
    alone = [list(Shares(LengthGroups([1], 4, 0), 4, process, 4)) for process in range(4)]
    assert alone == [[[0]]] * 4
