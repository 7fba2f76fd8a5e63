"""Runs in a process of their own that are stopped from outside or may not write."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command import Run, options, start
from safetensors.torch import load_file

from pelt_kernels.training.run_trainer import FILES, checkpoints


def long_options(model: Path, files: tuple[Path, Path]) -> list[object]:
    """A run of some seconds, on one thread like the process it is compared with."""
    return [*options(model, files), "--epochs", 10, "--patience", 10, "--lr", "1e-3"]


def wait_for_checkpoint(output: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240  # torch is slow to load on a busy machine
    while not list(output.glob("lr-*/checkpoint-*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_a_checkpoint_from_which_the_same_end_is_reached(
    run: Run,
    tiny_model: Path,
    toy_files: tuple[Path, Path],
    tmp_path: Path,
    number: signal.Signals,
) -> None:
    output = tmp_path / "stopped"
    arguments = ["train", *long_options(tiny_model, toy_files)]
    process = start(*arguments, "--output", output)
    wait_for_checkpoint(output, process)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    (folder,) = output.glob("lr-*")
    kept = checkpoints(folder)
    assert last.startswith(f"pelt-kernels: stopped by {number.name}; {kept[-1]} is kept")
    assert all(sorted(p.name for p in one.iterdir()) == sorted(FILES) for one in kept)
    assert not (output / "metrics.json").exists()
    if number == signal.SIGINT:
        return  # the rest is the same
    assert run("train", "--resume", "--output", output).code == 0
    assert run(*arguments, "--output", tmp_path / "whole").code == 0
    names = [
        folder / "adapter" / "pelt_model.safetensors" for folder in (output, tmp_path / "whole")
    ]
    one, two = map(load_file, names)
    assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)
    figures = [
        json.loads((folder / "metrics.json").read_text()) for folder in (output, tmp_path / "whole")
    ]
    assert figures[0]["accuracy"] == figures[1]["accuracy"]


def catches_sigterm(process: subprocess.Popen[str]) -> bool:
    """Python itself leaves it alone, so this is the first moment at which a signal is answered."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


def imports_torch(process: subprocess.Popen[str]) -> bool:
    return "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux for the moment")
@pytest.mark.parametrize("has_come", [catches_sigterm, imports_torch])
@pytest.mark.parametrize(
    ("command", "number"), [("train", signal.SIGINT), ("predict", signal.SIGTERM)]
)
def test_a_signal_at_the_start_is_one_line(
    has_come: Callable[[subprocess.Popen[str]], bool], command: str, number: signal.Signals
) -> None:
    process = start(command, stdin=subprocess.PIPE)
    while not has_come(process):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + number, "")
    assert err == f"pelt-kernels: stopped by {number.name}\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_of_a_command_is_one_line(
    run: Run, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Nothing half written is left, and the handlers of before are back."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    arguments = ["export", "--adapter", trained / "adapter", "--format", "adapter", "--output"]
    monkeypatch.setattr(
        "pelt_kernels.training.adapter_export.write_json", lambda *_: os.kill(os.getpid(), number)
    )
    refused = run(*arguments, tmp_path / "out").refused(128 + number)
    assert refused == f"pelt-kernels: stopped by {number.name}"
    assert list(tmp_path.iterdir()) == []
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


def test_a_write_that_fails_leaves_earlier_checkpoints(
    run: Run, tiny_model: Path, toy_files: tuple[Path, Path], tmp_path: Path
) -> None:
    """The first checkpoint is written; then files may no longer grow as large as the next needs."""
    output = tmp_path / "out"
    arguments = ["train", *long_options(tiny_model, toy_files), "--output", output]
    process = start(*arguments)
    wait_for_checkpoint(output, process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert "Traceback" not in err
    sentence = err.strip().splitlines()[-1]
    assert sentence.startswith("pelt-kernels: checkpoint ") and "cannot be written" in sentence
    (folder,) = output.glob("lr-*")
    kept = checkpoints(folder)
    assert kept and all(sorted(p.name for p in one.iterdir()) == sorted(FILES) for one in kept)
    assert not list(folder.glob(".partial-*"))
    assert run("train", "--resume", "--output", output).code == 0
