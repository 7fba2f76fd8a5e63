"""The bottleneck adapter as people write it: two nn.Linear, an activation, a gate, a residual.

The `adapters` library's own layer computes the same (`Adapter.forward` with `use_gating`), but
release 1.3.0 asks for transformers 4.57 and a huggingface_hub that still has HfFolder: it cannot be
imported beside the transformers 5 that this package needs, so it is not timed here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..from_tests import Case
from . import _parts

F = torch.nn.functional
ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "identity": lambda h: h,
}


def plain(
    x: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    down_index: Tensor | None,
    up_index: Tensor | None,
    pre_norm_weight: Tensor | None,
    pre_norm_bias: Tensor | None,
    post_norm_weight: Tensor | None,
    post_norm_bias: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    *,
    activation: str,
    pooling: str,
    residual_from: str,
    scale_value: float,
    pre_norm_eps: float,
    post_norm_eps: float,
    dropout_p: float,
    skip_below: float,
    **rest: Any,
) -> tuple[Tensor]:
    """residual + gate * scale * up(activation(down(x))); the seed is torch's own affair."""
    z = x
    if pre_norm_weight is not None:
        z = _norm(x, pre_norm_weight, pre_norm_bias, down_index, pre_norm_eps)
    h = ACTIVATIONS[activation](_parts.linear(z, w_down, b_down, down_index))
    y = _parts.linear(h, w_up, b_up, up_index)
    if post_norm_weight is not None:
        y = _norm(y, post_norm_weight, post_norm_bias, up_index, post_norm_eps)
    if dropout_p:
        y = F.dropout(y, dropout_p)
    # Factors are small tensors and numbers, so that [B, S, D] is multiplied once or not at all.
    factor: Tensor | float = scale_value
    if scale is not None:
        factor = factor * scale.to(x.dtype)
    if gate_weight is not None and gate_bias is not None:
        factor = factor * _parts.learned_gate(x, gate_weight, gate_bias, pooling, mask)
    elif gate is not None:
        values = _parts.over_rows(gate, x)
        factor = factor * (values if skip_below == -math.inf else values * (values >= skip_below))
    if isinstance(factor, Tensor) or factor != 1:
        y = factor * y
    if residual_from != "none":
        y = (x if residual is None else residual) + y
    return (y,)


def _norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor | None, eps: float
) -> Tensor:
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    if weight.ndim == 1:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = F.layer_norm(x, x.shape[-1:], eps=eps) * _of_rows(weight, index)
    return y if bias is None else y + _of_rows(bias, index)


def _of_rows(bank: Tensor, index: Tensor | None) -> Tensor:
    """The member that an index picks, against [B, S, D]."""
    if index is None:
        return bank[0]
    return bank[index][:, None] if index.ndim else bank[index]


PEERS: dict[str, Any] = {"plain": plain}


def serves(name: str, case: Case) -> bool:
    """Every case."""
    return True
