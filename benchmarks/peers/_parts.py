"""What the `plain` modules are put together from: torch's functions and nothing of this package,
so that no change to its kernels or its fallback moves the line they are measured against.

Master parameters are cast to the dtype of the activations, as autocast does.
"""

from __future__ import annotations

import torch
from torch import Tensor

F = torch.nn.functional


def picked(bank: Tensor, index: Tensor | None, rank: int) -> Tensor:
    """A weight of ``rank`` dimensions: itself, or out of a bank the one that ``index`` [] names, or
    those [B, ...] that ``index`` [B] names.
    """
    if bank.ndim == rank:
        return bank
    return bank[0] if index is None else bank[index]


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, weight_index: Tensor | None = None
) -> Tensor:
    """nn.Linear, with a bank's weight and bias by indexing."""
    weight = picked(weight, weight_index, 2).to(x.dtype)
    if bias is not None:
        bias = picked(bias, weight_index, 1).to(x.dtype)
    if weight.ndim == 2:
        return F.linear(x, weight, bias)
    y = x @ weight.transpose(1, 2)
    return y if bias is None else y + bias[:, None]


def learned_gate(
    x: Tensor, weight: Tensor, bias: Tensor, pooling: str, mask: Tensor | None
) -> Tensor:
    """sigmoid(Linear(x)), pooled over a sentence's rows: [B, 1, 1], or [B, S, 1] by token."""
    gate = torch.sigmoid(linear(x, weight[None], bias))
    if pooling == "token":
        return gate
    if mask is None or pooling == "mean":
        return gate.mean(dim=1, keepdim=True)
    counted = mask[:, :, None]
    return (gate * counted).sum(dim=1, keepdim=True) / counted.sum(dim=1, keepdim=True).clamp(min=1)


def over_rows(gate: Tensor, like: Tensor) -> Tensor:
    """A given gate [B] or [B, S] in a shape and dtype that multiplies [B, S, D]."""
    return (gate[:, None, None] if gate.ndim == 1 else gate[:, :, None]).to(like.dtype)
