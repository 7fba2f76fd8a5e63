"""Where a dropout seed comes from when the caller gives none."""

from __future__ import annotations

import torch


def draw_seed(dropout_p: float, seed: int | None) -> int:
    """The given seed, or one from torch's default CPU generator, whose state activation
    checkpointing restores.

    Nothing is drawn without dropout, so that a model in evaluation leaves the generator as it was.
    """
    if seed is not None:
        return seed
    if not dropout_p:
        return 0
    return int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64))
