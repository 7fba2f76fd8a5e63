"""Runs of `pelt-kernels` that a benchmark begins, and resumes where they were stopped."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def command(*words: str) -> int:
    """A command of `pelt-kernels` in a process of its own: its exit code."""
    return subprocess.run(
        [sys.executable, "-m", "pelt_kernels.cli", *words], check=False
    ).returncode


def trained(folder: Path, options: Sequence[str]) -> int:
    """The exit code of `pelt-kernels train` into a folder, resumed where a run was begun there."""
    begun = ["--resume"] if (folder / "run.json").is_file() else []
    return command("train", *options, "--output", str(folder), *begun)
