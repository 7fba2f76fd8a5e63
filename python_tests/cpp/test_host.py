"""What kernels and the host share, in an ordinary C++ program (host_test.cpp)."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"


@pytest.fixture(scope="module")
def line(compiled: Callable[..., Path]) -> Callable[[str], str]:
    """line(case): what host_test.cpp prints."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler on PATH")
    command = (compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}")
    binary = compiled("host_test", *command, HERE / "host_test.cpp")

    def line(case: str) -> str:
        found = subprocess.run([binary, case], capture_output=True, text=True, check=True)
        return found.stdout.strip()

    return line


def test_philox_known_answers(line: Callable[[str], str]) -> None:
    """The three vectors published with Random123 for philox4x32, 10 rounds."""
    assert line("philox") == (
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8 "
        "408f276d 41c83b0e a20bc7c6 6d5451fd "
        "d16cfe09 94fdcceb 5001e420 24126ea1"
    )


def test_conversions_round_to_nearest_even(line: Callable[[str], str]) -> None:
    """All 65536 patterns survive a round trip; then limits, ties and subnormals, f16/bf16."""
    expected = "7bff/4780 7c00/4780 6800/4500 6802/4500 0001/3380 0000/3300 0001/3300 0000/3089 8000/8000 7fff/7fff"
    assert line("conversions") == f"0 wrong; {expected}"


def test_activation_derivatives(line: Callable[[str], str]) -> None:
    assert max(map(float, line("activations").split())) < 1e-3


def test_first_fit(line: Callable[[str], str]) -> None:
    assert line("first_fit") == "1 1 0"
