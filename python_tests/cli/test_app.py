"""What the command answers before any of its subcommands: its version, and a shell's completion."""

from __future__ import annotations

import pytest
from command import Run, start

from pelt_kernels import __version__


def test_the_version_is_the_packages(run: Run) -> None:
    assert run("--version") == (0, f"pelt-kernels {__version__}\n", "")


def test_a_shell_completes_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the variables that the script of `--show-completion` sets for bash."""
    monkeypatch.setenv("_PELT_KERNELS_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "pelt-kernels train --res")
    monkeypatch.setenv("COMP_CWORD", "2")
    assert start().communicate(timeout=60) == ("--resume\n", "")
