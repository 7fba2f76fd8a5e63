"""The Triton kernels compile for GPUs that are not here, with the arguments and tiles of real
calls.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.language")  # not this folder, which also has the name

ROOT = Path(__file__).resolve().parents[2]
KERNELS = {
    f"_gated_adapter_{name}_kernel"
    for name in ("fwd", "bwd_rows", "bwd_pool", "bwd_columns", "bwd_sum")
}
# Every branch at once, and products of float32; where registers are counted also what the methods
# use, and sizes of 1.
SHORT = ("everything-bf16", "plain-f32")
METHODS = ("unipelt-bf16", "token-bf16", "rank_128-bf16", "rank_256-bf16")
LARGEST_SHARED = 64 * 1024  # of any AMD GPU; the smallest NVIDIA GPU has 99 KiB


def compiled(target: str, cases: tuple[str, ...], cache: Path) -> list[dict[str, object]]:
    """What compile_kernels.py tells of each kernel."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(Path(__file__).with_name("compile_kernels.py")), target, *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(
    "target", ["cuda:80", "cuda:100", "hip:gfx942", "hip:gfx90a", "hip:gfx1100"]
)
def test_every_kernel_compiles(target, tmp_path):
    check(compiled(target, SHORT, tmp_path))


def test_the_methods_kernels_do_not_spill(tmp_path):
    """On sm_90 ptxas keeps every accumulator in registers for what the methods use."""
    found = compiled("cuda:90", (*SHORT, *METHODS, "one_row-f16"), tmp_path)
    check(found)
    assert not [kernel for kernel in found if kernel["case"] in METHODS and kernel["spilled"]]


def check(found: list[dict[str, object]]) -> None:
    assert {kernel["kernel"] for kernel in found} == KERNELS
    for kernel in found:
        assert kernel["shared"] <= LARGEST_SHARED, kernel
