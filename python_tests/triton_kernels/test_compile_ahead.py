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

TESTS = Path(__file__).resolve().parents[1]
KERNELS = {
    "gated_adapter": ("fwd", "bwd_rows", "bwd_pool", "bwd_columns", "bwd_sum"),
    "lora_linear": (
        "shrink", "pool", "expand",
        "bwd_rows", "bwd_pool", "bwd_columns_in", "bwd_columns_out", "bwd_sum",
    ),
    "prefix_attention": ("fwd", "bwd_dq", "bwd_dkv", "bwd_prefix", "bwd_bias"),
}  # fmt: skip
# Every branch at once; where registers are counted what the methods use, first the call of which
# other_batch-bf16 is another batch, and with --every-case also products of float32 and sizes of 1.
EVERYTHING, FURTHER = "everything-bf16", ("plain-f32", "one_row-f16")
METHODS = {
    "gated_adapter": ("unipelt-bf16", "token-bf16", "rank_128-bf16", "rank_256-bf16"),
    "lora_linear": ("unipelt_query-bf16", "fused_qkv-bf16", "rank_64-bf16", "rank_256-bf16"),
    "prefix_attention": ("unipelt_long-bf16", "unipelt-bf16", "t5-bf16", "causal_128-bf16"),
}
# Bytes of the AMD GPUs and of an A100; where a GPU has less, a launch takes a smaller tile.
LARGEST_SHARED = {"hip": 64 * 1024, "cuda": 163 * 1024}


def compiled(
    target: str, operator: str, cases: tuple[str, ...], cache: Path
) -> list[dict[str, object]]:
    """What compile_kernels.py reports of each kernel."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}",
    }
    script = str(Path(__file__).with_name("compile_kernels.py"))
    command = [sys.executable, script, target, operator, *cases]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("operator", KERNELS)
def test_every_kernel_compiles(operator, target, tmp_path):
    check(operator, KERNELS, target, compiled(target, operator, (EVERYTHING,), tmp_path))


@pytest.mark.parametrize("operator", KERNELS)
def test_the_methods_kernels_do_not_spill(operator, every_case, tmp_path):
    """On sm_90 ptxas keeps every accumulator in registers for what the methods use, and a batch of
    another size runs the same kernels.
    """
    cases, target = METHODS[operator], "cuda:90"
    more = (*cases[1:], *FURTHER) if every_case else ()
    compiling = (EVERYTHING, cases[0], *more, "other_batch-bf16")
    found = compiled(target, operator, compiling, tmp_path)
    check(operator, KERNELS, target, found)
    assert "other_batch-bf16" not in {kernel["case"] for kernel in found}
    assert not [kernel for kernel in found if kernel["case"] in cases and kernel["spilled"]]


def check(
    operator: str,
    kernels: dict[str, tuple[str, ...]],
    target: str,
    found: list[dict[str, object]],
) -> None:
    assert {k["kernel"] for k in found} == {f"_{operator}_{n}_kernel" for n in kernels[operator]}
    for kernel in found:
        assert kernel["shared"] <= LARGEST_SHARED[target.split(":")[0]], kernel
