# ruff: noqa: N803, N806  (compile-time constants and the contract's letters are upper case)
"""The backward kernels of prefix_attention in Triton that own columns: dk and dv, and the prefix's.

    dK = scale · dsᵀ Q,  dV = pᵀ dout;  dPk = scale · (g ds)ᵀ Q,  dPv = (g p)ᵀ dout

Letters and ds as in _triton_bwd_rows.py, which leaves D. "dkv" owns BLOCK_N keys of one key-value
head and streams the queries of all heads that share it, with scores transposed [BLOCK_N, BLOCK_S]
so that they are the left operand of both products as they come.

"prefix" owns BLOCK_P rows of one segment, for one member of its table and one head, and a share of
all queries of the batch: the sum over samples stays in registers, and what is written has the
prefix's own shape, once for each share. Shares are added in their order.
"""

import triton
import triton.language as tl

from .._triton import keep_mask, product
from ._triton_bwd_rows import probability, row_lse
from ._triton_fwd import head_gate, kept, own_scores, row_tile, seen_keys, without_hidden


@triton.jit
def _dkv_tiles(
    dk, dv, k, v, q_ptr, mask_ptr, bias_ptr, bias_stride, lse_ptr, dout_ptr, delta_ptr, begin, end,
    start, row, q_stride, S, N, length, scale, seed_low, seed_high, threshold, keep_scale,
    P: tl.constexpr, E: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    CHECK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv of the keys from ``start`` on, with the queries begin ... end of the head
    whose first one has the number ``row`` in [B, H, S].

    A query beyond S is zero, as its dout and D are: it adds nothing.
    """
    rows = tl.arange(0, BLOCK_S)
    j = start + tl.arange(0, BLOCK_N)
    for first in range(begin, end, BLOCK_S):
        row_ok = first + rows < S
        q = row_tile(q_ptr, first, q_stride, S, E, BLOCK_S, BLOCK_E, True)
        dout = row_tile(dout_ptr, first, E, S, E, BLOCK_S, BLOCK_E, True)
        lse = row_lse(lse_ptr + first, rows, row_ok)
        delta = tl.load(delta_ptr + first + rows, mask=row_ok, other=0.0)
        dots = product(k, tl.trans(q), tl.zeros([BLOCK_N, BLOCK_S], tl.float32))
        scores = own_scores(
            dots, (first + rows)[None, :], j[:, None], mask_ptr, bias_ptr, bias_stride, S, N,
            length, scale, IS_CAUSAL, CHECK, 1.0,
        )  # fmt: skip
        # A row that does not exist is zeros, whose product with an infinite key is NaN.
        p = tl.where(row_ok[None, :], probability(scores, lse[None, :], q), 0.0)
        dp = product(v, tl.trans(dout), tl.zeros([BLOCK_N, BLOCK_S], tl.float32))
        dropped = p
        if HAS_DROPOUT:
            keep = keep_mask(
                row + first + rows, P + start, seed_low, seed_high, threshold, P + N, BLOCK_N
            )
            keep = tl.trans(keep)
            dropped, dp = kept(p, keep, keep_scale), kept(dp, keep, keep_scale)
        dv = product(dropped.to(q.dtype), dout, dv)
        ds = p * (dp - delta[None, :])
        dk = product(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=["S", "N", "tiles", "seed_low", "seed_high", "threshold"])
def _prefix_attention_bwd_dkv_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, lengths_ptr, bias_ptr, lse_ptr, dout_ptr, delta_ptr,
    dk_ptr, dv_ptr,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_g, k_stride_n,
    v_stride_b, v_stride_g, v_stride_n, bias_stride_b, bias_stride_h, bias_stride_s,
    S, N, tiles, scale, seed_low, seed_high, threshold, keep_scale,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, P: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_DROPOUT: tl.constexpr, SHIFT: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """BLOCK_N keys of one key-value head: dk and dv [B, G, N, E]."""
    pid = tl.program_id(0)
    start = (pid % tiles) * BLOCK_N - SHIFT
    bg = pid // tiles
    b, g = (bg // G).to(tl.int64), (bg % G).to(tl.int64)
    HEADS: tl.constexpr = H // G
    k_ptr += b * k_stride_b + g * k_stride_g
    v_ptr += b * v_stride_b + g * v_stride_g
    if mask_ptr is not None:
        mask_ptr += b * N
    k = row_tile(k_ptr, start, k_stride_n, N, E, BLOCK_N, BLOCK_E, True)
    v = row_tile(v_ptr, start, v_stride_n, N, E, BLOCK_N, BLOCK_E, True)
    dk = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)

    all_seen, length = seen_keys(lengths_ptr, mask_ptr, b, N)
    j = start + tl.arange(0, BLOCK_N)
    k = without_hidden(k, j, mask_ptr, length, N, True)
    v = without_hidden(v, j, mask_ptr, length, N, True)
    begin, clean = 0, 0  # the first query that sees a key here, and the first that sees all
    if IS_CAUSAL:
        begin = tl.maximum(start - (N - S), 0) // BLOCK_S * BLOCK_S
        clean = tl.maximum(start + BLOCK_N - 1 - (N - S), 0)
        clean = (clean + BLOCK_S - 1) // BLOCK_S * BLOCK_S
    is_whole = (start >= 0) & (start + BLOCK_N <= all_seen)
    clean = tl.where(is_whole, tl.minimum(clean, S), S)
    end = tl.where(start < length, S, 0)  # no query sees a key beyond the length
    clean = tl.minimum(clean, end)
    for n in range(HEADS):
        h = g * HEADS + n
        row = (b * H + h) * S
        head_q, head_bias = q_ptr + b * q_stride_b + h * q_stride_h, bias_ptr
        if bias_ptr is not None:
            head_bias += b * bias_stride_b + h * bias_stride_h
        dk, dv = _dkv_tiles(
            dk, dv, k, v, head_q, mask_ptr, head_bias, bias_stride_s, lse_ptr + row,
            dout_ptr + row * E, delta_ptr + row, begin, clean, start, row, q_stride_s, S, N,
            length, scale, seed_low, seed_high, threshold, keep_scale,
            P, E, IS_CAUSAL, HAS_DROPOUT, True, BLOCK_S, BLOCK_N, BLOCK_E,
        )  # fmt: skip
        dk, dv = _dkv_tiles(
            dk, dv, k, v, head_q, mask_ptr, head_bias, bias_stride_s, lse_ptr + row,
            dout_ptr + row * E, delta_ptr + row, clean, end, start, row, q_stride_s, S, N,
            length, scale, seed_low, seed_high, threshold, keep_scale,
            P, E, IS_CAUSAL, HAS_DROPOUT, False, BLOCK_S, BLOCK_N, BLOCK_E,
        )  # fmt: skip

    r, e = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_E)
    at = (bg.to(tl.int64) * N + start) * E + r[:, None] * E + e[None, :]
    ok = ((start + r >= 0) & (start + r < N))[:, None] & (e < E)[None, :]
    tl.store(dk_ptr + at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=ok)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _prefix_tiles(
    dk, dv, k, v, q_ptr, lse_ptr, dout_ptr, delta_ptr, gate, begin, end, start, row,
    q_stride, S, columns, scale, seed_low, seed_high, threshold, keep_scale,
    BEGIN: tl.constexpr, E: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv of the rows of a segment from ``start`` on, with the queries begin ... end
    of one head.
    """
    rows = tl.arange(0, BLOCK_S)
    for first in range(begin, end, BLOCK_S):
        row_ok = first + rows < end
        q = row_tile(q_ptr, first, q_stride, end, E, BLOCK_S, BLOCK_E, True)
        dout = row_tile(dout_ptr, first, E, end, E, BLOCK_S, BLOCK_E, True)
        lse = row_lse(lse_ptr + first, rows, row_ok)
        delta = tl.load(delta_ptr + first + rows, mask=row_ok, other=0.0)
        dots = product(k, tl.trans(q), tl.zeros([BLOCK_P, BLOCK_S], tl.float32))
        p = tl.where(row_ok[None, :], probability(dots * (gate * scale), lse[None, :], q), 0.0)
        dp = product(v, tl.trans(dout), tl.zeros([BLOCK_P, BLOCK_S], tl.float32)) * gate
        dropped = p
        if HAS_DROPOUT:
            keep = keep_mask(
                row + first + rows, BEGIN + start, seed_low, seed_high, threshold, columns, BLOCK_P
            )
            keep = tl.trans(keep)
            dropped, dp = kept(p, keep, keep_scale), kept(dp, keep, keep_scale)
        dv = product((dropped * gate).to(q.dtype), dout, dv)
        ds = p * (dp - delta[None, :])
        dk = product((ds * gate).to(q.dtype), q, dk)
    return dk, dv


@triton.jit(
    do_not_specialize=[
        "S", "columns", "members", "units", "units_per_share", "spans", "span",
        "seed_low", "seed_high", "threshold",
    ]
)  # fmt: skip
def _prefix_attention_bwd_prefix_kernel(
    q_ptr, prefix_k_ptr, prefix_v_ptr, index_ptr, gate_ptr, lse_ptr, dout_ptr, delta_ptr,
    dk_ptr, dv_ptr, q_stride_b, q_stride_h, q_stride_s,
    S, columns, members, units, units_per_share, spans, span, scale,
    seed_low, seed_high, threshold, keep_scale,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, LENGTH: tl.constexpr, BEGIN: tl.constexpr,
    GATE_PER_HEAD: tl.constexpr, HAS_DROPOUT: tl.constexpr, SHIFT: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One segment [LENGTH, G, E], whose columns start at BEGIN: one share's part of the gradients
    of BLOCK_P rows of one member, [shares, members, LENGTH, G, E] float32.

    A unit of work is a span of one sample's queries, for all heads of the group.
    """
    TILES: tl.constexpr = (LENGTH + SHIFT + BLOCK_P - 1) // BLOCK_P
    HEADS: tl.constexpr = H // G
    pid = tl.program_id(0)
    start = (pid % TILES) * BLOCK_P - SHIFT
    pid = pid // TILES
    g = (pid % G).to(tl.int64)
    pid = pid // G
    part = pid.to(tl.int64)  # of [shares, members]
    which = pid % members
    share = pid // members
    here = g * E + which.to(tl.int64) * (LENGTH * G * E)
    # k and v of one sample's dtype: as in forward, masters are rounded to it.
    k = row_tile(prefix_k_ptr + here, start, G * E, LENGTH, E, BLOCK_P, BLOCK_E, True)
    v = row_tile(prefix_v_ptr + here, start, G * E, LENGTH, E, BLOCK_P, BLOCK_E, True)
    k, v = k.to(q_ptr.dtype.element_ty), v.to(q_ptr.dtype.element_ty)
    dk = tl.zeros([BLOCK_P, BLOCK_E], tl.float32)
    dv = tl.zeros([BLOCK_P, BLOCK_E], tl.float32)
    first_unit = share * units_per_share
    for unit in range(first_unit, tl.minimum(first_unit + units_per_share, units)):
        b = (unit // spans + tl.full([], 0, tl.int64)).to(tl.int64)
        begin = (unit % spans) * span
        end = tl.minimum(begin + span, S)
        if index_ptr is not None:
            picked = tl.load(index_ptr + b)
            end = tl.where(picked == which, end, begin)
        for n in range(HEADS):
            h = g * HEADS + n
            row = (b * H + h) * S
            gate = head_gate(gate_ptr, b, b * H + h, GATE_PER_HEAD)
            dk, dv = _prefix_tiles(
                dk, dv, k, v, q_ptr + b * q_stride_b + h * q_stride_h, lse_ptr + row,
                dout_ptr + row * E, delta_ptr + row, gate, begin, end, start, row, q_stride_s, S,
                columns, scale, seed_low, seed_high, threshold, keep_scale,
                BEGIN, E, HAS_DROPOUT, BLOCK_S, BLOCK_P, BLOCK_E,
            )  # fmt: skip
    r, e = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_E)
    at = ((part * LENGTH + start + r[:, None]) * G + g) * E + e[None, :]
    ok = ((start + r >= 0) & (start + r < LENGTH))[:, None] & (e < E)[None, :]
    tl.store(dk_ptr + at, dk * scale, mask=ok)
    tl.store(dv_ptr + at, dv, mask=ok)
