"""Predicted times on a GPU, written before the first measurement, which will confirm them or not.

    python -m benchmarks.predictions [--module build/cuda/pelt_kernels/_C*.so] > predictions.md

Per shape, the bytes that the CUDA kernels move by their design, and the products, over what an H200
was seen to do: 4.3 TB/s in a copy, 790 TFLOP/s in a bf16 product. `mma.sync` is taken to reach 60 %
of the latter and cuBLAS 90 %, a memory-bound kernel 85 % of the former, a launch to cost 3 us.
With ``--module``, also what each kernel's machine code holds, counted by cuobjdump.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import torch

from . import roofline, shapes
from .from_tests import Case

COPY, PRODUCT, LAUNCH = 4.3e12, 790e12, 3e-6
COPY_SHARE = 0.85
# Launches forward and backward; how often the design reads or writes the large tensors beyond once,
# in tensors of [rows, width]; the share of the matrix units' rate.
DESIGN = {
    "gated_adapter": (1, 3, 0.0, 2.0, 0.6),  # backward reads x and dy for the weights again
    "prefix_attention": (1, 4, 0.0, 3.0, 0.6),  # q, dout, k and v, by two kernels
    "lora_linear": (4, 6, 2.0, 3.0, 0.9),  # beside cuBLAS: y written again, x and dy read again
    "masked_weight": (1, 2, 0.0, 0.0, 1.0),
    "symmetric_kl": (1, 1, 0.0, 0.0, 1.0),
}
COUNTED = ("HMMA", "LDGSTS", "LDSM", "LDG.E.128", "STG.E.128", "BAR.SYNC", "MUFU")


def predicted(operator: str, case: Case) -> tuple[float, float, float, float]:
    """The floor and the prediction, forward and backward, in seconds."""
    limit = roofline.work(operator, case, torch.bfloat16)
    design = roofline.work(operator, _unmasked(operator, case), torch.bfloat16)
    launches, launches_back, again, again_back, share = DESIGN[operator]
    tensor = _largest(case) * torch.bfloat16.itemsize
    rows = []
    for at, (count, more) in enumerate(((launches, again), (launches_back, again_back))):
        moved = (design.bytes[at] + more * tensor) / (COPY * COPY_SHARE)
        floor = max(limit.bytes[at] / COPY, limit.flops[at] / PRODUCT)
        busy = max(moved, design.flops[at] / (PRODUCT * share))
        rows.append((floor, busy + count * LAUNCH))
    (floor, time), (floor_back, time_back) = rows
    return floor, time, floor_back, time_back


def _unmasked(operator: str, case: Case) -> Case:
    """The case as kernels work on it: they read and multiply what is behind a mask too."""
    mask, _ = shapes.BEHIND_MASK.get(operator, ("", ()))
    return replace(case, fill={**case.fill, mask: 1}) if mask else case


def _largest(case: Case) -> int:
    z = case.sizes
    if "E" in z:
        return z["B"] * z["H"] * z["S"] * z["E"]
    return z.get("B", 1) * z.get("S", 1) * max(z.get("D", 0), z.get("Dout", 0), z.get("C", 0))


def machine_code(module: Path) -> dict[str, Counter[str]]:
    """Kernel -> how many of each counted instruction its code for sm_80 holds."""
    tool = shutil.which("cuobjdump") or str(files("triton") / "backends/nvidia/bin/cuobjdump")
    done = subprocess.run([tool, "-sass", "-arch", "sm_80", str(module)], text=True,
                          capture_output=True, check=True)  # fmt: skip
    by_kernel: dict[str, Counter[str]] = {}
    for line in done.stdout.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            counts = by_kernel.setdefault(match[1], Counter())
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?(\S+)", line):
            counts["all"] += 1
            counts.update(name for name in COUNTED if match[1].startswith(name))
    return by_kernel


def _readable(name: str) -> str:
    """fwd_sm80<Config<bf16, 64>> of a mangled name."""
    plain = subprocess.run(["c++filt", name], text=True, capture_output=True, check=True).stdout
    plain = re.sub(r"\(anonymous namespace\)::|pelt::|void |\(\w+\)(?=\d)", "", plain.strip())
    return plain[: plain.rfind("(")]


def main() -> None:
    """Prints the tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--module", type=Path)
    options = parser.parse_args()
    print("| operator | case | forward, us: limit, predicted | backward, us: limit, predicted |")
    print("|---|---|---|---|")
    for operator in DESIGN:
        for case in shapes.cases_of(operator, "cuda"):
            us = [f"{1e6 * seconds:,.1f}" for seconds in predicted(operator, case)]
            print(f"| `{operator}` | {case.id} | {us[0]}, {us[1]} | {us[2]}, {us[3]} |")
    if options.module:
        print(f"\n| kernel | instructions | {' | '.join(COUNTED)} |")
        print(f"|---|---|{'---|' * len(COUNTED)}")
        for name, counts in sorted(machine_code(options.module).items()):
            row = " | ".join(str(counts[word]) for word in COUNTED)
            print(f"| `{_readable(name)}` | {counts['all']} | {row} |")


if __name__ == "__main__":
    main()
