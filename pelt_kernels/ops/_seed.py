"""Where a dropout seed comes from when the caller gives none."""

from __future__ import annotations

from typing import Any

import torch

from ._arguments import whole
from ._formula import is_recorded


def draw_seed(operator: str, dropout_p: float, seed: int | None) -> Any:
    """The given seed, or one from torch's default CPU generator, whose state activation
    checkpointing restores.

    Where each operation is recorded it stays a tensor, so that a traced function draws again at
    each call, and `torch.vmap` for each sample if it is asked to (``randomness="different"``).
    Nothing is drawn without dropout, so that a model in evaluation leaves the generator as it was.
    """
    if seed is not None:
        return whole(operator, "seed", seed)
    if not dropout_p:
        return 0
    drawn = torch.randint(0, 2**63 - 1, (), dtype=torch.int64)
    return drawn if is_recorded() else int(drawn)
