"""The small sizes and tensors of calls that are about arguments and not about numbers."""

from __future__ import annotations

import torch
from torch import Tensor

B, S, D, R = 2, 5, 16, 4


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Ones."""
    return torch.ones(shape, dtype=dtype)
