"""Gates: the sentence- or token-wise scalars that scale an adapter, a prefix or a LoRA branch.

Learned gate (UniPELT, Mao et al., ACL 2022): ``g = pool_t( sigmoid( w . x_t + b ) )``, the sigmoid
first, then the pooling over the S rows of a sentence: ``token`` (none: each row its own gate),
``mean`` (over all rows, padding included, as the official code does) or ``masked_mean`` (over rows
whose mask is True: independent of padding).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TOKEN = "token"
POOLINGS = (TOKEN, "mean", "masked_mean")
_SMALL = 1 << 17  # elements of [T, D]


class LearnedGate(NamedTuple):
    """A learned gate: weight [D], bias [1], and how the rows of a sentence are pooled."""

    weight: Tensor
    bias: Tensor
    pooling: str = "masked_mean"


def check_pooling(operator: str, pooling: str, mask: Tensor | None) -> None:
    """Raises ValueError for an unknown pooling or a missing mask."""
    if pooling not in POOLINGS:
        raise ValueError(
            f"{operator}: expected a gate's pooling to be one of {', '.join(POOLINGS)}, got "
            f"{pooling!r}"
        )
    if pooling == "masked_mean" and mask is None:
        raise ValueError(
            f"{operator}: expected mask [B, S] beside a gate with pooling 'masked_mean', got None; "
            "pass mask= or use pooling 'mean'"
        )


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of reductions: float32, or float64 for the float64 reference."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)`` without the dispatch that costs time where there is nothing to do."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def row_gates(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """sigmoid(w . x_t + b) [B, S] in the accumulator dtype; the weight is first rounded to the
    dtype of x.
    """
    acc = accumulator(x.dtype)
    return torch.sigmoid(x.to(acc) @ weight.to(x.dtype).to(acc) + bias.to(acc))


def quick_row_gates(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`row_gates` by one product in the dtype of x, to which a logit is then rounded: 16-bit
    activations are not copied to float32.

    Few of them are, since on a CPU a product in bfloat16 with one column has its price: 128 x 768
    take 27 us through a copy that stays in the cache, and 43 us without (Xeon, AVX-512).
    """
    acc = accumulator(x.dtype)
    if not x.numel():  # of no rows `torch.addmv` makes one
        return row_gates(x, weight, bias)
    if x.dtype != acc and x.numel() > _SMALL:
        logits = torch.nn.functional.linear(x, cast(weight, x.dtype)[None], cast(bias, x.dtype))
        return logits[..., 0].to(acc).sigmoid_()
    weight, bias = cast(cast(weight, x.dtype), acc), cast(bias, acc)
    rows = cast(x.flatten(0, -2), acc)
    return torch.addmv(bias, rows, weight).sigmoid_().view(x.shape[:-1])


def pool(gates: Tensor, pooling: str, mask: Tensor | None) -> Tensor:
    """[B] for a pooled gate, [B, S] for ``token``. A sentence without real tokens: 0."""
    if pooling == "token":
        return gates
    if not gates.shape[1]:
        return gates.sum(dim=1)
    if pooling == "mean":
        return gates.mean(dim=1)
    assert mask is not None
    return torch.where(mask, gates, 0.0).sum(1) / _real_rows(mask)


def learned_gate(
    x: Tensor, weight: Tensor, bias: Tensor, pooling: str, mask: Tensor | None
) -> Tensor:
    """The gate of the rows of x by the formula, for autograd; rows that do not count have no part
    in its gradients either.
    """
    if pooling == "masked_mean":
        x = counted(x, mask)
    return pool(row_gates(x, weight, bias), pooling, mask)


def counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """x with zeros for the rows that do not count, whatever they hold."""
    assert mask is not None
    return torch.where(mask.unsqueeze(-1), x, 0.0)


def _real_rows(mask: Tensor) -> Tensor:
    return mask.sum(1).clamp(min=1)


def pool_backward(dgate: Tensor, gates: Tensor, pooling: str, mask: Tensor | None) -> Tensor:
    """dlogit [B, S] from dgate ([B] or [B, S]) and the rows' gates: d sigmoid = s (1 - s), then the
    pooling's share.
    """
    if pooling == "mean":
        dgate = (dgate / gates.shape[1]).unsqueeze(1).expand_as(gates)
    elif pooling == "masked_mean":
        assert mask is not None
        dgate = (dgate / _real_rows(mask)).unsqueeze(1).expand_as(gates)
        return torch.where(mask, torch.ops.aten.sigmoid_backward(dgate, gates), 0.0)
    return torch.ops.aten.sigmoid_backward(dgate, gates)


def over_rows(gate: Tensor) -> Tensor:
    """A gate [B] or [B, S] in a shape that multiplies [B, S, D]."""
    return gate.view(-1, 1, 1) if gate.ndim == 1 else gate.unsqueeze(-1)
