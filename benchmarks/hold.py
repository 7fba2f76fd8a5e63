"""The rule that a backend is held to before it is timed."""

from __future__ import annotations

import gc
from typing import Any

import torch

from .contenders import inputs_of
from .from_tests import Case, parity


def hold(operator: str, request: str, case: Case, dtype: str, device: str) -> None:
    """Holds a backend to the closeness rule, on a GPU with inputs drawn there. Where memory does
    not hold the float64 truth of 16-bit kernels, float32 is the truth, whose error is nothing
    beside theirs.
    """
    if device == "cpu":
        parity.check(operator, request, case, dtype)
        return

    def draw(n: int) -> list[Any]:
        return inputs_of(operator, case, dtype, device, n)

    try:
        parity.check(operator, request, case, dtype, draw)
        return
    except torch.OutOfMemoryError:
        if dtype == "float32":
            raise
    gc.collect()
    torch.cuda.empty_cache()
    print(f"{operator:16} {case.id:22} {dtype:9} held to a truth in float32", flush=True)
    parity.check(operator, request, case, dtype, draw, true=torch.float32)
