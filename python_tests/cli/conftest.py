"""Fixtures of whole commands on a tiny encoder."""

from pathlib import Path

import pytest
from command import options, run
from tiny_encoder import tiny_model, toy_files

__all__ = ["run", "tiny_model", "toy_files", "trained"]


@pytest.fixture(scope="session")
def trained(
    tiny_model: Path, toy_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The output of a finished run; read only."""
    from pelt_kernels.cli import main

    output = tmp_path_factory.mktemp("trained") / "run"
    arguments = ["train", *options(tiny_model, toy_files), "--output", output]
    assert main([str(argument) for argument in arguments]) == 0
    return output
