"""Attention over learned prefixes and the model's own keys, with the prefix's gate inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .._arguments import (
    cast_activation,
    counts,
    default_scale,
    draw_seed,
    flag,
    fold,
    groups,
    number,
)
from .._register import Operator
from .contract import CONTRACT, reference

_operator = Operator(CONTRACT, reference)
_NAME = CONTRACT.name


class Prefix(NamedTuple):
    """One prefix segment: k and v [P, G, E] shared by the batch, or tables [A, P, G, E] with index
    int64 [B].
    """

    k: Tensor
    v: Tensor
    index: Tensor | None = None  # type: ignore[assignment]  # tuple.index is not needed here


def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefixes: Sequence[Prefix] = (),
    *,
    gate: Tensor | None = None,
    key_mask: Tensor | None = None,
    lengths: Tensor | None = None,
    is_causal: bool = False,
    bias: Tensor | None = None,
    scale: float | Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``out = softmax([g · scale · Q Pkᵀ ; scale · Q Kᵀ + bias + mask]) [g · Pv ; V]``

    Args:
        q: [B, H, S, E]; float32, float16 or bfloat16. Any strides with E contiguous, so a [B, S, H,
            E] view costs no copy.
        k, v: [B, G, N, E]; H a multiple of G (grouped-query attention).
        prefixes: up to four `Prefix` segments, in order, in front of k: [P, G, E] shared by the
            batch, or a table [A, P, G, E] with an index int64 [B], whose values are checked on the
            CPU only. Nothing is expanded to the batch
            or concatenated to k. They have q's dtype, or float32 beside 16-bit activations.
        gate: [B] or [B, H], multiplies prefix keys and values; a gate of 0 leaves zero keys that
            take softmax mass.
        key_mask or lengths: [B, N] bool (True: seen), or the number of seen keys, integers [B] from
            0 to N (of a GPU's values a smaller one counts as 0 and a greater one as N). Prefix
            columns are always seen.
        is_causal: bottom-right aligned: row i sees keys j <= i + N - S.
        bias: additive, [B or 1, H or 1, S, N] (T5's relative positions); 0 on prefix columns.
        scale: a number, or a [] tensor with a gradient, which multiplies q beforehand; default 1 /
            sqrt(E); T5 uses 1.
        dropout_p, seed: attention dropout, prefix columns included; the mask is a function of the
            seed (Philox4x32-10). Without a seed one is drawn from torch's CPU generator.
        return_lse: also return the log-sum-exp of the scores, float32 [B, H, S], without gradient.
        backend: a backend's name; None: `use_backend`'s, else as `explain` tells.

    Returns:
        out [B, H, S, E], or (out, lse). A row that sees nothing is 0 with gradient 0, and its lse
        is -inf.

    Raises:
        ValueError: a shape, dtype, device or index that does not fit; a backend that was asked for
            and cannot serve the call. TypeError: an argument of another type.

    Saved for backward: q, k, v, out and the log-sum-exp. Papers: Li and Liang 2021 (prefix tuning);
    Mao et al. 2022 (UniPELT's gate); Clive et al. 2022 (Control Prefixes: tables).
    """
    q, k, v = cast_activation(q), cast_activation(k), cast_activation(v)
    scale, (q,) = fold(_NAME, "scale", default_scale(_NAME, q) if scale is None else scale, q)
    dropout_p = number(_NAME, "dropout_p", dropout_p)
    prefixes = groups(_NAME, "prefixes", prefixes, Prefix)
    values = (q, k, v, *prefix_lists(prefixes), gate, key_mask, counts(lengths), bias)
    attributes = (flag(_NAME, "is_causal", is_causal), scale, dropout_p)
    out, lse = _operator(values, attributes, draw_seed(_NAME, dropout_p, seed), backend)
    return (out, lse) if flag(_NAME, "return_lse", return_lse) else out


def prefix_lists(
    prefixes: Sequence[Prefix],
) -> tuple[list[Tensor], list[Tensor], list[Tensor | None]]:
    """Keys, values and indices of the prefixes, as the contract takes them."""
    return (
        [prefix.k for prefix in prefixes],
        [prefix.v for prefix in prefixes],
        [prefix.index for prefix in prefixes],
    )
