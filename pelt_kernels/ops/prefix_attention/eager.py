"""prefix_attention composed of PyTorch operations, with the closed form of its gradient.

The gate multiplies scores and probabilities of the prefix columns instead of its keys and values,
and a shared prefix is never expanded to the batch. Backward rebuilds the probabilities from the
log-sum-exp: with D = rowsum(dout · out), ``dS = P (dout Vᵀ - D)``, dropout included.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._contract import Chosen, Signature, Value
from .._gate import accumulator
from .._philox import dropout_factor
from . import _flash_joined
from ._inputs import Inputs
from .contract import softmax_with_lse, visible_keys


def supports(signature: Signature, backend: str, form: str, needs_grad: bool = True) -> str:
    """PyTorch serves every signature."""
    return ""


def forward(chosen: Chosen, seed: int, **inputs: Any) -> tuple[Tensor, Tensor]:
    """out [B, H, S, E] and log-sum-exp [B, H, S]."""
    x = Inputs(**inputs).without_hidden()
    if not _flash_joined.why_not(chosen):
        return _flash_joined.forward(chosen, x)
    p, lse = probabilities(chosen, x)
    if chosen.attributes["dropout_p"]:
        p = p * _dropout(chosen, p, seed)
    prefix, dtype = p.shape[-1] - x.k.shape[2], x.q.dtype
    out = p[..., prefix:].to(dtype) @ x.v.unsqueeze(2)
    if prefix:
        weights = _gated(p[..., :prefix], _by_head(chosen, x.gate)).to(dtype)
        out = out + weights @ _joined(x.prefix_v, x.prefix_index).to(dtype)
    return out.reshape(x.q.shape), lse.reshape(x.q.shape[:3])


def backward(
    chosen: Chosen,
    needs: dict[str, bool],
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: int,
    **inputs: Any,
) -> dict[str, Value]:
    """The gradients that ``needs`` names, by input name."""
    x = Inputs(**inputs).without_hidden()
    if not needs["bias"] and not _flash_joined.why_not(chosen):
        return _flash_joined.backward(chosen, needs, dout, out, lse, x)
    dtype, acc, scale = x.q.dtype, accumulator(x.q.dtype), chosen.attributes["scale"]
    g, keys = _by_head(chosen, x.gate), _joined(x.prefix_k, x.prefix_index)
    scores, raw = _scores(chosen, x, keys, g)
    prefix = scores.shape[-1] - x.k.shape[2]
    q, d = _grouped(chosen, x.q), _grouped(chosen, dout)
    if _flash_joined.why_not(chosen):
        lse = lse.reshape(scores.shape[:-1])
    else:  # forward's was that of scores which nothing had rounded
        lse = torch.logsumexp(scores, dim=-1)
    p = torch.exp(scores - torch.where(lse == -math.inf, 0.0, lse)[..., None])
    dp = (d @ x.v.unsqueeze(2).transpose(-1, -2)).to(acc)
    grads: dict[str, Value] = {}
    if prefix:
        values = _joined(x.prefix_v, x.prefix_index).to(dtype)
        raw_dp = (d @ values.transpose(-1, -2)).to(acc)
        dp = torch.cat([_gated(raw_dp, g), dp], dim=-1)
    dropped = p
    if chosen.attributes["dropout_p"]:
        factor = _dropout(chosen, p, seed)
        dropped, dp = p * factor, dp * factor
    delta = (dout.to(acc) * out).sum(-1).reshape(lse.shape)
    ds = p * (dp - delta[..., None])
    own = (scale * ds[..., prefix:]).to(dtype)
    dq = own @ x.k.unsqueeze(2)
    grads["k"] = (own.transpose(-1, -2) @ q).sum(2)
    grads["v"] = (dropped[..., prefix:].to(dtype).transpose(-1, -2) @ d).sum(2)
    if x.bias is not None and needs["bias"]:
        dbias = ds[..., prefix:].flatten(1, 2).sum_to_size(x.bias.shape)
        grads["bias"] = dbias.to(x.bias.dtype)
    if prefix:
        first = (scale * _gated(ds[..., :prefix], g)).to(dtype)
        dq = dq + first @ keys.to(dtype)
        weights = _gated(dropped[..., :prefix], g).to(dtype)
        grads["prefix_k"] = _split_prefix_grad(first, q, x.prefix_k, x.prefix_index)
        grads["prefix_v"] = _split_prefix_grad(weights, d, x.prefix_v, x.prefix_index)
        if x.gate is not None and raw is not None:
            both = ds[..., :prefix] * raw + dropped[..., :prefix] * raw_dp
            both = both.sum((-1, -2)).flatten(1)  # [B, H]
            grads["gate"] = (both if x.gate.ndim == 2 else both.sum(1)).to(x.gate.dtype)
    elif x.gate is not None:
        grads["gate"] = torch.zeros_like(x.gate)
    if not prefix:
        grads["prefix_k"] = [torch.zeros_like(t) for t in x.prefix_k]
        grads["prefix_v"] = [torch.zeros_like(t) for t in x.prefix_v]
    grads["q"] = dq.reshape(x.q.shape)
    return {name: grads[name] for name, need in needs.items() if need}


def probabilities(signature: Signature, x: Inputs) -> tuple[Tensor, Tensor]:
    """Before dropout, [B, G, H / G, S, P + N], and their log-sum-exp [B, G, H / G, S]."""
    keys = _joined(x.prefix_k, x.prefix_index)
    scores, _ = _scores(signature, x, keys, _by_head(signature, x.gate))
    return softmax_with_lse(scores)


def _grouped(signature: Signature, q: Tensor) -> Tensor:
    """[B, H, S, E] -> [B, G, H / G, S, E]: the query heads that share a key-value head."""
    groups = signature.sizes["G"]
    return q.unflatten(1, (groups, signature.sizes["H"] // groups))


def _by_head(signature: Signature, gate: Tensor | None) -> Tensor | None:
    """The gate as [B, G or 1, H / G or 1, 1, 1] in the accumulator dtype."""
    if gate is None:
        return None
    gate = gate.to(accumulator(signature.dtype))
    if gate.ndim == 1:
        return gate[:, None, None, None, None]
    return _grouped(signature, gate[:, :, None, None])


def _gated(columns: Tensor, gate: Tensor | None) -> Tensor:
    return columns if gate is None else columns * gate


def _joined(prefixes: list[Tensor], indices: list[Tensor | None]) -> Tensor:
    """All segments in order, [1 or B, G, 1, P, E]; expanded to the batch only beside a table."""
    rows = _flash_joined.prefix_rows(prefixes, indices)
    return torch.empty(0) if rows is None else rows.transpose(1, 2).unsqueeze(2)


def _scores(
    signature: Signature, x: Inputs, keys: Tensor, gate: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Scores [B, G, H / G, S, P + N], -inf where a key is not seen; and the prefix columns' scores
    before the gate.
    """
    acc, scale = accumulator(x.q.dtype), signature.attributes["scale"]
    # In float16 a product is larger than the largest number long before the score is, so the scale
    # comes first: as a power of 2, which rounds nothing, and what that leaves in float32.
    power = 2.0 ** min(math.frexp(scale)[1] - 1, 0)
    q, scale = _grouped(signature, x.q) * power, scale / power
    scores = scale * (q @ x.k.unsqueeze(2).transpose(-1, -2)).to(acc)
    if x.bias is not None:
        bias = x.bias.to(acc)
        scores = scores + (bias.unsqueeze(2) if bias.shape[1] == 1 else _grouped(signature, bias))
    is_causal = signature.attributes["is_causal"]
    visible = visible_keys(signature.sizes, x.key_mask, x.lengths, is_causal, q.device)
    if visible is not None:
        scores = scores.masked_fill(~visible.unsqueeze(2), -math.inf)
    if not keys.numel():
        return scores, None
    raw = scale * (q @ keys.to(x.q.dtype).transpose(-1, -2)).to(acc)
    return torch.cat([_gated(raw, gate), scores], dim=-1), raw


def _split_prefix_grad(
    columns: Tensor, rows: Tensor, prefixes: list[Tensor], indices: list[Tensor | None]
) -> list[Tensor]:
    """columnsᵀ rows for each segment: summed over the batch if shared, by index for a table."""
    grads: list[Tensor] = []
    position = 0
    for prefix, index in zip(prefixes, indices):
        length = prefix.shape[-3]
        part = columns[..., position : position + length]
        position += length
        if index is None:
            grads.append(torch.einsum("bghsp,bghse->pge", part, rows).to(prefix.dtype).contiguous())
        else:
            each = torch.einsum("bghsp,bghse->bpge", part, rows).to(prefix.dtype)
            grads.append(torch.zeros_like(prefix).index_add_(0, index, each))
    return grads


def _dropout(signature: Signature, p: Tensor, seed: int) -> Tensor:
    rows = p.numel() // max(p.shape[-1], 1)
    return dropout_factor(rows, p.shape[-1], signature.attributes["dropout_p"], seed, p).view_as(p)
