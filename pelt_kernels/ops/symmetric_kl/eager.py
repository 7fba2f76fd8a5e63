"""symmetric_kl composed of PyTorch operations, with the closed form of its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .._contract import Chosen, Signature, Value
from .._gate import accumulator


def supports(signature: Signature, backend: str, form: str, needs_grad: bool = True) -> str:
    """PyTorch serves every signature."""
    return ""


def forward(chosen: Chosen, z1: Tensor, z2: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss [], and both log-sum-exps [2, T] for backward.

    ``KL(p2 ‖ p1) + KL(p1 ‖ p2)`` is ``Σ (p1 - p2) (log p1 - log p2)``: one sum for both.
    """
    acc = accumulator(z1.dtype)
    z1, z2 = z1.to(acc), z2.to(acc)
    lse = torch.stack([z1.logsumexp(-1), z2.logsumexp(-1)])
    # Beside a logit of infinity, and where all are -inf, a softmax is NaN as a whole.
    lse += lse - lse
    log_p1, log_p2 = z1 - lse[0][:, None], z2 - lse[1][:, None]
    weights = log_p1.exp() - log_p2.exp()
    # A class that neither has counts 0, though its difference is -inf - (-inf).
    terms = torch.where(weights == 0, 0.0, weights * (log_p1 - log_p2))
    rows = 0.5 * terms.sum(-1)
    if mask is not None:
        rows = torch.where(mask, rows, 0.0)
    return rows.sum() / _count(rows, mask), lse


def backward(
    chosen: Chosen,
    needs: dict[str, bool],
    dloss: Tensor,
    lse: Tensor,
    z1: Tensor,
    z2: Tensor,
    mask: Tensor | None,
) -> dict[str, Value]:
    """The gradients that ``needs`` names: ±0.5 (p1 - p2) / count."""
    acc = accumulator(z1.dtype)
    difference = (z1.to(acc) - lse[0][:, None]).exp() - (z2.to(acc) - lse[1][:, None]).exp()
    difference *= 0.5 * dloss / _count(difference, mask)
    if mask is not None:
        difference = torch.where(mask[:, None], difference, 0.0)
    grads: dict[str, Value] = {}
    if needs["z1"]:
        grads["z1"] = difference.to(z1.dtype)
    if needs["z2"]:
        grads["z2"] = -difference.to(z2.dtype)
    return grads


def _count(rows: Tensor, mask: Tensor | None) -> Tensor | int:
    """How many rows count; 1 where none does, so that an empty mean is 0."""
    return max(rows.shape[0], 1) if mask is None else mask.sum().clamp(min=1)
