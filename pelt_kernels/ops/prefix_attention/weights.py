"""The probabilities of prefix_attention as a tensor, for those who want to look at them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._autocast import cast_activation
from .._scale import fold
from . import eager
from .contract import CONTRACT


def attention_weights(
    q: Tensor,
    k: Tensor,
    prefixes: Sequence[tuple[Tensor, Tensor, Tensor | None]] = (),
    *,
    gate: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | Tensor | None = None,
) -> Tensor:
    """``softmax([g · scale · Q Pkᵀ ; scale · Q Kᵀ + mask])`` [B, H, S, P + N].

    Prefix columns come first. By PyTorch's operations, differentiable, before dropout; arguments
    and errors are those of `prefix_attention`, which never makes this tensor: its output is these
    weights times [g · Pv ; V]. A row sums to 1, with a gate of 0 too, which leaves zero keys that
    take softmax mass; a row that sees nothing is 0.
    """
    q, k = cast_activation(q), cast_activation(k)
    keys, values = [prefix[0] for prefix in prefixes], [prefix[1] for prefix in prefixes]
    indices = [prefix[2] for prefix in prefixes]
    scale, (q,) = fold(
        "attention_weights: scale", q.shape[-1] ** -0.5 if scale is None else scale, q
    )
    inputs = (q, k, k, keys, values, indices, gate, key_mask, None, None)
    call = CONTRACT.bind(inputs, (is_causal, scale, 0.0))
    CONTRACT.check_indices(call, inputs)
    with torch.autocast(q.device.type, enabled=False):
        p, _ = eager.probabilities(call, q, k, keys, indices, gate, key_mask, None, None)
    return p.flatten(1, 2).to(q.dtype)
