"""Kernels find the members of their parameters where launchers write them: the host's compiler and
nvcc's device compiler lay out every struct alike.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"


@pytest.mark.backend("cuda_sim")
def test_host_and_device_agree(
    launch: Callable[..., Tensor], nvcc: Path, compiled: Callable[..., Path]
) -> None:
    # Of a .cpp, nvcc leaves everything to the host's compiler, and knows where CUDA's headers are.
    command = (nvcc, "-std=c++17", "-Xcompiler=-Wall,-Wextra,-Werror", "--cudart=none", f"-I{CSRC}")
    program = compiled("layouts", *command, HERE / "layouts.cpp")
    printed = subprocess.run([program], capture_output=True, text=True, check=True)
    lines = [line.split(maxsplit=2) for line in printed.stdout.splitlines()]
    on_host = {name: (int(offset), int(size)) for offset, size, name in lines}
    assert len(on_host) == len(lines) > 200
    found = launch("layouts", "write_layouts", words=2 * len(lines), threads=32).view(-1, 2)
    on_device = dict(zip(on_host, map(tuple, found.tolist()), strict=True))
    assert on_device == on_host
