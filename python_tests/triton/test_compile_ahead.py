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
    "gated_adapter": ("fwd", "bwd_rows", "bwd_pool", "bwd_columns", "bwd_sum"),
    "lora_linear": (
        "shrink", "pool", "expand",
        "bwd_rows", "bwd_pool", "bwd_columns_in", "bwd_columns_out", "bwd_sum",
    ),
}  # fmt: skip
# Every branch at once, and products of float32; where registers are counted also what the methods
# use, and sizes of 1.
SHORT = ("everything-bf16", "plain-f32")
METHODS = {
    "gated_adapter": ("unipelt-bf16", "token-bf16", "rank_128-bf16", "rank_256-bf16"),
    "lora_linear": ("unipelt_query-bf16", "fused_qkv-bf16", "rank_64-bf16", "rank_256-bf16"),
}
LARGEST_SHARED = 64 * 1024  # of any AMD GPU; the smallest NVIDIA GPU has 99 KiB


def compiled(
    target: str, operator: str, cases: tuple[str, ...], cache: Path
) -> list[dict[str, object]]:
    """What compile_kernels.py tells of each kernel."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    script = str(Path(__file__).with_name("compile_kernels.py"))
    command = [sys.executable, script, target, operator, *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(
    "target", ["cuda:80", "cuda:100", "hip:gfx942", "hip:gfx90a", "hip:gfx1100"]
)
@pytest.mark.parametrize("operator", KERNELS)
def test_every_kernel_compiles(operator, target, tmp_path):
    check(operator, compiled(target, operator, SHORT, tmp_path))


@pytest.mark.parametrize("operator", KERNELS)
def test_the_methods_kernels_do_not_spill(operator, tmp_path):
    """On sm_90 ptxas keeps every accumulator in registers for what the methods use."""
    cases = METHODS[operator]
    found = compiled("cuda:90", operator, (*SHORT, *cases, "one_row-f16"), tmp_path)
    check(operator, found)
    assert not [kernel for kernel in found if kernel["case"] in cases and kernel["spilled"]]


def check(operator: str, found: list[dict[str, object]]) -> None:
    assert {k["kernel"] for k in found} == {f"_{operator}_{n}_kernel" for n in KERNELS[operator]}
    for kernel in found:
        assert kernel["shared"] <= LARGEST_SHARED, kernel
