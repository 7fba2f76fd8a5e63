"""The calls of masked_weight and symmetric_kl for which Triton's kernels are compiled ahead.

Names end with the dtype of activations; parameters are float32 masters beside 16 bits.
"""

from __future__ import annotations

import torch
from cases import Case


def _weight(rows: int, columns: int, r: int, r2: int) -> Case:
    sizes = {"Dout": rows, "Din": columns, "R": r, "R2": r2}
    return Case("", sizes, attributes={"keep": rows * columns // 10})


def _logits(rows: int, classes: int, inputs: str = "") -> Case:
    return Case("", {"T": rows, "C": classes}, inputs)


SMALL_CASES = {
    "masked_weight": {
        "pst-bf16": (torch.bfloat16, _weight(768, 3072, 8, 8)),
        "pst-f32": (torch.float32, _weight(3072, 768, 8, 8)),
        "rank_32-bf16": (torch.bfloat16, _weight(1000, 333, 32, 32)),
        "rank_32-f32": (torch.float32, _weight(1000, 333, 32, 17)),
        "one_entry-f16": (torch.float16, _weight(1, 1, 1, 1)),
    },
    "symmetric_kl": {
        "classes-f32": (torch.float32, _logits(64, 3)),
        "tokens-bf16": (torch.bfloat16, _logits(512, 50257, "mask")),
        "one_logit-f16": (torch.float16, _logits(1, 1, "mask")),
    },
}
