"""The probabilities of prefix_attention as a tensor, for inspection."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._arguments import cast_activation, default_scale, flag, fold, groups
from . import Prefix, eager, prefix_lists
from ._inputs import Inputs
from .contract import CONTRACT

_NAME = "attention_weights"


def attention_weights(
    q: Tensor,
    k: Tensor,
    prefixes: Sequence[Prefix] = (),
    *,
    gate: Tensor | None = None,
    key_mask: Tensor | None = None,
    is_causal: bool = False,
    bias: Tensor | None = None,
    scale: float | Tensor | None = None,
) -> Tensor:
    """``softmax([g · scale · Q Pkᵀ ; scale · Q Kᵀ + bias + mask])`` [B, H, S, P + N].

    Prefix columns come first. By PyTorch's operations, differentiable, before dropout; arguments
    and errors are those of `prefix_attention`, which never makes this tensor: its output is these
    weights times [g · Pv ; V]. A row sums to 1, with a gate of 0 too, which leaves zero keys that
    take softmax mass; a row that sees nothing is 0.
    """
    q, k = cast_activation(q), cast_activation(k)
    prefixes = groups(_NAME, "prefixes", prefixes, Prefix)
    scale, (q,) = fold(_NAME, "scale", default_scale(_NAME, q) if scale is None else scale, q)
    # v has no effect here; k is passed in its place.
    inputs = Inputs(
        q, k, k, *prefix_lists(prefixes), gate=gate, key_mask=key_mask, lengths=None, bias=bias
    )
    call = CONTRACT.bind(inputs, (flag(_NAME, "is_causal", is_causal), scale, 0.0))
    CONTRACT.check_indices(call, inputs)
    device = "cpu" if q.is_meta else q.device.type
    with torch.autocast(device, enabled=False):
        p, _ = eager.probabilities(call, inputs)
    return p.flatten(1, 2).to(q.dtype)
