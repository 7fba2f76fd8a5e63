"""The consistency loss as people write it: two log-softmaxes and torch's divergence both ways."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..from_tests import Case

F = torch.nn.functional


def plain(z1: Tensor, z2: Tensor, mask: Tensor | None, **rest: Any) -> tuple[Tensor]:
    """The loss in float32, each divergence's target a constant."""
    log_p1, log_p2 = (F.log_softmax(z, -1, dtype=_at_least_float32(z)) for z in (z1, z2))
    rows = (
        F.kl_div(log_p1, log_p2.detach(), reduction="none", log_target=True)
        + F.kl_div(log_p2, log_p1.detach(), reduction="none", log_target=True)
    ).sum(-1) / 2
    if mask is None:
        return (rows.sum() / max(rows.shape[0], 1),)
    return ((rows * mask).sum() / mask.sum().clamp(min=1),)


def _at_least_float32(z: Tensor) -> torch.dtype:
    return torch.promote_types(z.dtype, torch.float32)


PEERS: dict[str, Any] = {"plain": plain}


def serves(name: str, case: Case) -> bool:
    """Every case."""
    return True
