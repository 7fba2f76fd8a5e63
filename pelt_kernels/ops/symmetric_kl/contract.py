"""symmetric_kl: what it takes and gives, and its formula in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._contract import Contract, Signature
from .._gate import accumulator


def output_shapes(signature: Signature) -> dict[str, Any]:
    """The shapes of the outputs of a signature."""
    return {"loss": (), "lse": (2, signature.sizes["T"])}


CONTRACT = Contract(
    name="symmetric_kl",
    inputs="""
        z1    activation  [T, C]  view
        z2    activation  [T, C]  view
        mask  bool?       [T]
    """,
    attributes="",
    outputs="""
        loss  float32  differentiable
        lse   float32  saved private
    """,
    has_seed=False,
    output_shapes=output_shapes,
    never_zero="C",  # a softmax needs a class
)


def reference(z1: Tensor, z2: Tensor, mask: Tensor | None) -> tuple[Tensor]:
    """The loss by the formula, differentiable by autograd with detached targets."""
    acc = accumulator(z1.dtype)
    if mask is not None:
        z1, z2 = (torch.where(mask[:, None], z, 0.0) for z in (z1, z2))
    log_p1, log_p2 = z1.to(acc).log_softmax(-1), z2.to(acc).log_softmax(-1)

    def divergence(target: Tensor, log_p: Tensor) -> Tensor:
        target = target.detach()
        # 0 log 0 is 0: a class that the target does not have.
        return torch.where(target == -torch.inf, 0.0, target.exp() * (target - log_p)).sum(-1)

    rows = 0.5 * (divergence(log_p2, log_p1) + divergence(log_p1, log_p2))
    if mask is None:
        # A sum and not a size, so that a recorded formula counts the rows of each new input.
        return (rows.sum() / torch.ones_like(rows, dtype=torch.int64).sum().clamp(min=1),)
    return (torch.where(mask, rows, 0.0).sum() / mask.sum().clamp(min=1),)
