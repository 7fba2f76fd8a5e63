"""Banks: several weights of one shape, of which an index picks one per batch (AdaMix) or one per
sample.
"""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from ._gate import cast


@overload
def member(bank: Tensor, index: Tensor | None, rank: int) -> Tensor: ...


@overload
def member(bank: None, index: Tensor | None, rank: int) -> None: ...


@overload
def member(bank: Tensor | None, index: Tensor | None, rank: int) -> Tensor | None: ...


def member(bank: Tensor | None, index: Tensor | None, rank: int) -> Tensor | None:
    """The weight itself, the member of a bank that ``index`` [] names, or the members [B, ...] that
    ``index`` [B] names.

    ``rank`` is the number of dimensions of one member. A bank of one needs no index.
    """
    if bank is None or bank.ndim == rank:
        return bank
    if index is None:
        return bank[0]
    return bank.index_select(0, index.reshape(-1))[0] if index.ndim == 0 else bank[index]


def member_grad(grad: Tensor, bank: Tensor, index: Tensor | None) -> Tensor:
    """A bank's gradient from the gradient of what `member` returned: added where it was picked, 0
    elsewhere.
    """
    grad = cast(grad, bank.dtype)
    if grad.shape == bank.shape and index is None:
        return grad
    out = torch.zeros_like(bank, memory_format=torch.contiguous_format)
    if index is None:
        out[0] = grad
    elif index.ndim == 0:
        out.index_add_(0, index.reshape(1), grad[None])
    else:
        out.index_add_(0, index, grad)
    return out


def check_bank(operator: str, name: str, size: int, index_name: str, has_index: bool) -> None:
    """Raises ValueError for a bank of several members without an index."""
    if size > 1 and not has_index:
        raise ValueError(
            f"{operator}: expected {index_name} beside a bank {name} of {size} members, got None; "
            "pass bank_index [] (one for the batch) or [B] (one for each sample)"
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b in the dtype of x, for a weight [O, I] or one for each sample [B, O, I]."""
    weight = cast(weight, x.dtype)
    bias = None if bias is None else cast(bias, x.dtype)
    if weight.ndim == 2:
        return torch.nn.functional.linear(x, weight, bias)
    out = x @ weight.transpose(1, 2)
    if bias is None:
        return out
    return out + (bias[:, None] if bias.ndim == 2 else bias)


def weight_grad(d: Tensor, a: Tensor, per_sample: bool) -> Tensor:
    """dᵀ a over all rows [O, I], or for each sample [B, O, I]; d is [B, S, O], a is [B, S, I]."""
    if per_sample:
        return d.transpose(1, 2) @ a
    d, a = d.flatten(0, 1), a.flatten(0, 1)
    # MKL takes 2.5 times as long with the narrow one on the right (T = 512, 384 and 8 columns).
    is_turned = d.is_cpu and a.shape[1] < d.shape[1]
    return (a.T @ d).T.contiguous() if is_turned else d.T @ a


def bias_grad(d: Tensor, per_sample: bool, accumulator: torch.dtype) -> Tensor:
    """The sum of d over all rows [O], or over each sample's rows [B, O]."""
    return d.sum(dim=1 if per_sample else (0, 1), dtype=accumulator)
