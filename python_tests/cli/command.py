"""Runs the command in this process or in a new one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from pelt_kernels.cli import main


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    def refused(self, code: int) -> str:
        """The one sentence of a command that ended with `code`."""
        assert self.code == code, self
        assert "Traceback" not in self.out + self.err
        lines = self.err.strip().splitlines()
        assert lines and lines[-1].startswith("pelt-kernels: "), self
        assert not [line for line in lines[:-1] if line.startswith("pelt-kernels: ")], self
        return lines[-1]


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs ``pelt-kernels ...`` here."""

    def here(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return here


def start(*arguments: object, **options: object) -> subprocess.Popen[str]:
    """Starts ``pelt-kernels ...`` in a new process."""
    return subprocess.Popen(
        [sys.executable, "-m", "pelt_kernels.cli", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        **options,  # type: ignore[call-overload]
    )


def options(model: Path, files: tuple[Path, Path]) -> list[object]:
    """A run of a second on the toy task."""
    return [
        "--task", files[0], "--eval", files[1], "--model", model, "--batch-size", 8,
        "--max-length", 16, "--device", "cpu", "--train-examples", 48, "--epochs", 2,
    ]  # fmt: skip
