"""PST's pruned weight as people write it: scores, the highest of them, a straight-through mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..from_tests import Case


def plain(
    w0: Tensor,
    u: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    row: Tensor,
    col: Tensor,
    *,
    keep: int,
    beta: float,
    alpha1: float,
    alpha2: float,
    **rest: Any,
) -> tuple[Tensor]:
    """(w0 + beta u v) where its score is among the ``keep`` highest, 0 elsewhere; the gradient
    passes the mask as if it were its scores.
    """
    u, v, a, b, row, col = (t.to(w0.dtype) for t in (u, v, a, b, row, col))
    w = torch.addmm(w0, u, v, alpha=beta)
    structure = row[:, None] + col
    scores = w.abs() + alpha1 * (a @ b) + alpha2 * structure
    flat = scores.detach().flatten()
    mask = torch.zeros_like(flat)
    mask[flat.topk(keep, sorted=False).indices] = 1
    mask = mask.view_as(scores)
    if scores.requires_grad:
        mask = mask + (scores - scores.detach())
    return (w * mask,)


PEERS: dict[str, Any] = {"plain": plain}


def serves(name: str, case: Case) -> bool:
    """Scores that are drawn: of equal ones, torch's choice is not the contract's."""
    return not case.fill
