"""Prefix attention as people write it on torch's own attention: expand, gate, concatenate, mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..from_tests import Case

F = torch.nn.functional


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: list[Tensor],
    prefix_v: list[Tensor],
    prefix_index: list[Tensor | None],
    gate: Tensor | None,
    key_mask: Tensor | None,
    lengths: Tensor | None,
    bias: Tensor | None,
    *,
    is_causal: bool,
    scale: float,
    dropout_p: float,
    **rest: Any,
) -> tuple[Tensor]:
    """out; the seed is torch's own affair."""
    (batch, heads, s, _), (groups, n) = q.shape, k.shape[1:3]
    if gate is not None and gate.ndim == 2 and heads != groups:
        # A gate for each query head: those that share a key have prefixes of their own.
        k, v = (t.repeat_interleave(heads // groups, dim=1) for t in (k, v))
        prefix_k, prefix_v = (
            [p.repeat_interleave(heads // groups, dim=-2) for p in prefixes]
            for prefixes in (prefix_k, prefix_v)
        )
        groups = heads

    def expanded(prefixes: list[Tensor]) -> Tensor:
        parts = [
            (p.expand(batch, *p.shape) if index is None else p[index]).transpose(1, 2)
            for p, index in zip(prefixes, prefix_index)
        ]
        joined = torch.cat(parts, dim=2).to(q.dtype)
        if gate is None:
            return joined
        by_head = gate[:, None] if gate.ndim == 1 else gate
        return joined * by_head[:, :, None, None].to(q.dtype)

    length = sum(p.shape[-3] for p in prefix_k)
    keys = torch.cat([expanded(prefix_k), k], dim=2) if prefix_k else k
    values = torch.cat([expanded(prefix_v), v], dim=2) if prefix_v else v
    if lengths is not None:
        key_mask = torch.arange(n, device=q.device) < lengths[:, None]
    mask: Tensor | None = None
    if key_mask is not None:
        mask = F.pad(key_mask, (length, 0), value=True)[:, None, None, :]
    if is_causal:
        rows = torch.arange(s, device=q.device)[:, None]
        columns = torch.arange(-length, n, device=q.device)
        causal = (columns <= rows + n - s) | (columns < 0)
        mask = causal if mask is None else mask & causal
    if bias is not None:
        added = F.pad(bias, (length, 0)).to(q.dtype)
        mask = added if mask is None else added.masked_fill(~mask, float("-inf"))
    out = F.scaled_dot_product_attention(
        q, keys, values, mask, dropout_p, scale=scale, enable_gqa=heads != groups
    )
    return (out,)


PEERS: dict[str, Any] = {"plain": plain}


def serves(name: str, case: Case) -> bool:
    """Every case."""
    return True
