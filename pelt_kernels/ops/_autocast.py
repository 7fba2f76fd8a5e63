"""Autocast, as `torch.nn.functional.linear` meets it: activations are cast, parameters stay and are
read as masters.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cast_activation(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is on for its device; float64 and everything else stay
    as they are.
    """
    if not isinstance(x, Tensor):
        return x
    device = x.device.type
    if (
        device != "meta"
        and torch.is_autocast_enabled(device)
        and x.dtype
        in (
            torch.float32,
            torch.float16,
            torch.bfloat16,
        )
    ):
        return x.to(torch.get_autocast_dtype(device))
    return x
