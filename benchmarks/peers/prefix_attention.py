"""Prefix attention as people write it on torch's own attention: expand, gate, concatenate, mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pelt_kernels.ops._cases import Case


def concatenated(
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
    seed: int,
) -> tuple[Tensor]:
    """out; the seed is torch's own affair."""
    (batch, heads, s, _), (groups, n) = q.shape, k.shape[1:3]

    def expanded(prefixes: list[Tensor]) -> Tensor:
        parts = [
            (p.expand(batch, *p.shape) if index is None else p[index]).transpose(1, 2)
            for p, index in zip(prefixes, prefix_index)
        ]
        joined = torch.cat(parts, dim=2).to(q.dtype)
        return joined if gate is None else joined * gate[:, None, None, None].to(q.dtype)

    length = sum(p.shape[-3] for p in prefix_k)
    keys = torch.cat([expanded(prefix_k), k], dim=2)
    values = torch.cat([expanded(prefix_v), v], dim=2)
    mask: Tensor | None = None
    if key_mask is not None:
        mask = torch.nn.functional.pad(key_mask, (length, 0), value=True)[:, None, None, :]
    if is_causal:
        rows = torch.arange(s, device=q.device)[:, None]
        causal = torch.arange(-length, n, device=q.device) <= rows + n - s
        mask = causal if mask is None else mask & causal
    if bias is not None:
        added = torch.nn.functional.pad(bias, (length, 0)).to(q.dtype)
        mask = added if mask is None else added.masked_fill(~mask, float("-inf"))
    out = torch.nn.functional.scaled_dot_product_attention(
        q, keys, values, mask, dropout_p, scale=scale, enable_gqa=heads != groups
    )
    return (out,)


PEERS: dict[str, Any] = {"cat+sdpa": concatenated}


def serves(name: str, case: Case) -> bool:
    """Any case that no lengths shorten."""
    return "lengths" not in case.inputs
