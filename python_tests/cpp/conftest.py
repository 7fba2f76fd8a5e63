"""Compiles the small C++ programs of these tests, once per session."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from parity import run

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SANITIZED = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
)
Runner = Callable[..., list[str]]


@pytest.fixture
def same_bits(threads):
    """same_bits(operator, backend, case, precision, counts): results are the same bits on each of these
    numbers of threads as on one, but for those in ``but``.
    """

    def same_bits(operator, backend, case, precision, counts, but=()):
        threads(1)
        alone = run(operator, backend, case, precision)
        for count in counts:
            threads(count)
            for name, value in run(operator, backend, case, precision).items():
                assert name in but or torch.equal(value, alone[name]), f"{name}, {count} threads"

    return same_bits


def _build(folder: Path, flags: tuple[str, ...]) -> Path:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    binary = folder / "sim_test"
    sources = [HERE / "sim_test.cpp", CSRC / "sim" / "executor.cpp", CSRC / "sim" / "fiber.cpp"]
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-DPELT_SIM", f"-I{CSRC}", f"-I{HERE}",
         *flags, *map(str, sources), "-o", str(binary)],
        check=True,
    )  # fmt: skip
    return binary


def _runner(binary: Path) -> Runner:
    def run(case: str, seeds: int = 1, may_crash: bool = False) -> list[str]:
        """The lines that a case prints, one for each seed; with `may_crash` also what a sanitizer says."""
        result = subprocess.run(
            [binary, case, str(seeds)], capture_output=True, text=True, timeout=60, check=False
        )
        assert may_crash or result.returncode == 0, result.stderr
        return (result.stdout + (result.stderr if may_crash else "")).splitlines()

    return run


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """Runs a case of sim_test.cpp in an ordinary build."""
    return _runner(_build(tmp_path_factory.mktemp("plain"), ()))


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """The same under address and undefined-behaviour sanitizers."""
    return _runner(_build(tmp_path_factory.mktemp("sanitized"), SANITIZED))


@pytest.fixture(scope="session")
def portable(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    """The same with ucontext in place of the assembly switch, which other processors than x86-64 use."""
    return _runner(_build(tmp_path_factory.mktemp("portable"), ("-DPELT_SIM_UCONTEXT",)))
