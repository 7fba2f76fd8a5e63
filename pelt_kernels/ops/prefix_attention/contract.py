"""prefix_attention: what it takes and gives, and its formula in plain PyTorch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._contract import Contract, Signature, Value
from .._gate import accumulator
from .._philox import dropout_factor
from .._product import product

MAX_SEGMENTS = 4


def rules(signature: Signature, values: dict[str, Value]) -> None:
    """What shapes cannot say: which inputs go together."""
    name, sizes, given = signature.contract.name, signature.sizes, signature.given
    if sizes["H"] % sizes["G"]:
        raise ValueError(
            f"{name}: expected the query heads H to be a multiple of the key-value heads G, "
            f"got H={sizes['H']} (from q) and G={sizes['G']} (from k)"
        )
    segments = len(values["prefix_k"])
    if segments > MAX_SEGMENTS:
        raise ValueError(
            f"{name}: expected at most {MAX_SEGMENTS} prefixes, got {segments}; concatenate some of"
            " them"
        )
    if not segments == len(values["prefix_v"]) == len(values["prefix_index"]):
        raise ValueError(
            f"{name}: expected as many prefix_v and prefix_index as prefix_k ({segments}), "
            f"got {len(values['prefix_v'])} and {len(values['prefix_index'])}"
        )
    for i, (keys, index) in enumerate(zip(values["prefix_k"], values["prefix_index"])):
        if (keys.ndim == 4) != (index is not None):
            raise ValueError(
                f"{name}: expected an index [B] with a table of prefixes [A, P, G, E] and none with"
                f" a shared prefix [P, G, E], got prefix {i} {list(keys.shape)}"
                f" {'with' if index is not None else 'without'} an index"
            )
    if "key_mask" in given and "lengths" in given:
        raise ValueError(f"{name}: expected key_mask or lengths, got both; leave one out")


def output_shapes(signature: Signature) -> dict[str, Any]:
    """The shapes of the outputs of a call."""
    b, h, s, e = (signature.sizes[letter] for letter in "BHSE")
    return {"out": (b, h, s, e), "lse": (b, h, s)}


CONTRACT = Contract(
    name="prefix_attention",
    inputs="""
        q             activation    [B, H, S, E]  view
        k             activation    [B, G, N, E]  view
        v             activation    [B, G, N, E]  view
        prefix_k      parameter*    [P_i, G, E] | [A_i, P_i, G, E]  view
        prefix_v      parameter*    [P_i, G, E] | [A_i, P_i, G, E]  view
        prefix_index  index(A_i)?*  [B]
        gate          parameter?    [B] | [B, H]
        key_mask      bool?         [B, N]
        lengths       count(N)?     [B]
        bias          parameter?    [B, H, S, N] | [1, H, S, N] | [B, 1, S, N] | [1, 1, S, N]
    """,
    attributes="""
        is_causal  bool = false
        scale      float = 1.0   (-inf, inf)
        dropout_p  float = 0.0   [0, 1)
    """,
    outputs="""
        out  activation  differentiable saved
        lse  float32     saved
    """,
    has_seed=True,
    rules=rules,
    output_shapes=output_shapes,
    never_zero="G E A_i",
    longest_list=MAX_SEGMENTS,
)


def visible_keys(
    call_sizes: dict[str, Any],
    key_mask: Tensor | None,
    lengths: Tensor | None,
    is_causal: bool,
    device: torch.device,
) -> Tensor | None:
    """[B or 1, 1, S or 1, N] bool: which keys a query sees; None if all. Causal is bottom-right
    aligned.
    """
    s, n = call_sizes["S"], call_sizes["N"]
    visible = None if key_mask is None else key_mask[:, None, None, :]
    if lengths is not None:
        visible = (torch.arange(n, device=device) < lengths[:, None])[:, None, None, :]
    if is_causal:
        rows, columns = torch.arange(s, device=device)[:, None], torch.arange(n, device=device)
        causal = (columns <= rows + n - s)[None, None]
        visible = causal if visible is None else visible & causal
    return visible


def without_hidden(rows: Tensor, key_mask: Tensor | None, lengths: Tensor | None) -> Tensor:
    """Keys or values [B, G, N, E], with zeros where the mask or the length hides them: a
    probability of 0 times a NaN would be one.
    """
    if key_mask is None and lengths is None:
        return rows
    visible = visible_keys({"S": 1, "N": rows.shape[2]}, key_mask, lengths, False, rows.device)
    assert visible is not None
    return torch.where(visible.transpose(2, 3), rows, 0.0)


def softmax_with_lse(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and log-sum-exp over the last dimension; a row of -inf gives zeros and -inf,
    never NaN.
    """
    lse = torch.logsumexp(scores, dim=-1)
    return torch.exp(scores - torch.where(lse == -math.inf, 0.0, lse)[..., None]), lse


def reference(
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
) -> tuple[Tensor, Tensor]:
    """out and log-sum-exp by the formula, with every prefix gathered, expanded and concatenated as
    the papers write it.
    """
    acc = accumulator(q.dtype)
    (batch, heads, s, _), (groups, n) = q.shape, k.shape[1:3]
    keys, values = (
        without_hidden(rows, key_mask, lengths).repeat_interleave(heads // groups, 1)
        for rows in (k, v)
    )

    def scores_of(keys: Tensor) -> Tensor:
        # Scaled before they are rounded: in float16 products are larger than the largest number
        # long before scores are.
        return (scale * (q.to(acc) @ keys.to(acc).transpose(-1, -2))).to(q.dtype).to(acc)

    scores = scores_of(keys)
    if bias is not None:
        scores = scores + bias.to(acc)
    visible = visible_keys({"S": s, "N": n}, key_mask, lengths, is_causal, q.device)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)

    def expanded(prefixes: list[Tensor]) -> Tensor:
        parts = [
            prefix[None].expand(batch, -1, -1, -1) if index is None else prefix[index]
            for prefix, index in zip(prefixes, prefix_index)
        ]
        joined = torch.cat(parts, dim=1).to(q.dtype).transpose(1, 2)  # [B, G, P, E]
        if gate is not None:
            by_head = (gate if gate.ndim == 2 else gate[:, None].expand(-1, heads))[
                :, :, None, None
            ]
            return joined.repeat_interleave(heads // groups, 1) * by_head.to(acc)
        return joined.repeat_interleave(heads // groups, 1)

    if prefix_k:
        before = expanded(prefix_k).to(q.dtype)
        scores = torch.cat([scores_of(before), scores], dim=-1)
        values = torch.cat([expanded(prefix_v).to(q.dtype), values], dim=2)
    p, lse = softmax_with_lse(scores)
    if dropout_p:
        p = p * dropout_factor(batch * heads * s, p.shape[-1], dropout_p, seed, p).view_as(p)
    return product(p.to(q.dtype), values), lse.detach()
