# ruff: noqa: N803, N806  (compile-time constants and the contract's letters are upper case)
"""The backward kernels of prefix_attention in Triton that own queries: dq, the gate's gradient, and
the bias's.

With s the scores, p = exp(s - lse), D = <dout, out> of a row and dropout's factors on p and dp:

    dp = dout [g · Pv ; V]ᵀ,  ds = p (dp - D)
    dq = scale · ds [g · Pk ; K],  dg = Σ ds · scale · (Q Pkᵀ) + p · (dout Pvᵀ)

"dq" streams the columns as forward does and leaves D for the kernels that own columns
(_triton_bwd_columns.py): columns and rows are two kernels, so that no sum crosses programs. "bias"
makes ds once more where a bias needs its gradient: a program owns a tile of the bias and adds up
the samples and heads that share it, in order, so nothing of the size of all scores is written.
"""

import triton
import triton.language as tl

from .._triton import keep_mask, product
from ._triton_fwd import (
    exponential,
    head_gate,
    kept,
    key_range,
    own_scores,
    prefix_tile,
    row_tile,
    seen_keys,
    without_hidden,
)


@triton.jit
def row_lse(lse_ptr, rows, row_ok):
    """The log-sum-exp of rows; 0 for a row that saw nothing, whose scores are all -inf."""
    lse = tl.load(lse_ptr + rows, mask=row_ok, other=0.0)
    return tl.where(lse == float("-inf"), 0.0, lse)


@triton.jit
def probability(scores, lse, like):
    """exp(scores - lse). The difference comes before the change of base: an error of lse in base 2
    would be the same for a whole row, and no sum over the row would lose it.
    """
    return exponential(scores - lse, like)


@triton.jit
def _dq_tiles(
    dq, q, dout, lse, delta, k_ptr, v_ptr, mask_ptr, bias_ptr, bias_stride, begin, end, first, row,
    k_stride, v_stride, S, N, length, scale, seed_low, seed_high, threshold, keep_scale,
    P: tl.constexpr, E: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    CHECK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """dq / scale with the keys begin ... end."""
    i = first + tl.arange(0, BLOCK_S)
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        k = row_tile(k_ptr, start, k_stride, N, E, BLOCK_N, BLOCK_E, CHECK)
        v = row_tile(v_ptr, start, v_stride, N, E, BLOCK_N, BLOCK_E, CHECK)
        k = without_hidden(k, j, mask_ptr, length, N, CHECK)
        v = without_hidden(v, j, mask_ptr, length, N, CHECK)
        dots = product(q, tl.trans(k), tl.zeros([BLOCK_S, BLOCK_N], tl.float32))
        scores = own_scores(
            dots, i[:, None], j[None, :], mask_ptr, bias_ptr, bias_stride, S, N, length, scale,
            IS_CAUSAL, CHECK, 1.0,
        )  # fmt: skip
        p = probability(scores, lse[:, None], q)
        dp = product(dout, tl.trans(v), tl.zeros([BLOCK_S, BLOCK_N], tl.float32))
        if HAS_DROPOUT:
            keep = keep_mask(
                row + tl.arange(0, BLOCK_S), P + start, seed_low, seed_high, threshold, P + N,
                BLOCK_N,
            )  # fmt: skip
            dp = kept(dp, keep, keep_scale)
        ds = p * (dp - delta[:, None])
        dq = product(ds.to(k.dtype), k, dq)
    return dq


@triton.jit(do_not_specialize=["S", "N", "tiles", "seed_low", "seed_high", "threshold"])
def _prefix_attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, prefix_k_ptrs, prefix_v_ptrs, index_ptrs, gate_ptr, mask_ptr, lengths_ptr,
    bias_ptr, out_ptr, lse_ptr, dout_ptr, delta_ptr, dq_ptr, dgate_ptr,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_g, k_stride_n,
    v_stride_b, v_stride_g, v_stride_n, bias_stride_b, bias_stride_h, bias_stride_s,
    S, N, tiles, scale, seed_low, seed_high, threshold, keep_scale,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, P: tl.constexpr, BEGINS: tl.constexpr,
    LENGTHS: tl.constexpr, GATE_PER_HEAD: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, SHIFT: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """BLOCK_S queries of one head: D [B, H, S], dq, and the program's part of the gate's gradient
    [B, H, tiles]; the last two where they are wanted.
    """
    pid = tl.program_id(0)
    tile = tiles - 1 - pid % tiles
    first = tile * BLOCK_S
    bh = pid // tiles
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    g = h // (H // G)
    row = bh.to(tl.int64) * S + first
    rows, e = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_E)
    row_ok = rows < S - first
    q_ptr += b * q_stride_b + h * q_stride_h
    k_ptr += b * k_stride_b + g * k_stride_g
    v_ptr += b * v_stride_b + g * v_stride_g
    if mask_ptr is not None:
        mask_ptr += b * N
    if bias_ptr is not None:
        bias_ptr += b * bias_stride_b + h * bias_stride_h
    dout = row_tile(dout_ptr + row * E, 0, E, S - first, E, BLOCK_S, BLOCK_E, True)
    out = row_tile(out_ptr + row * E, 0, E, S - first, E, BLOCK_S, BLOCK_E, True)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    tl.store(delta_ptr + row + rows, delta, mask=row_ok)

    if dq_ptr is not None or dgate_ptr is not None:
        lse = row_lse(lse_ptr + row, rows, row_ok)
        q = row_tile(q_ptr, first, q_stride_s, S, E, BLOCK_S, BLOCK_E, True)
        dq = tl.zeros([BLOCK_S, BLOCK_E], tl.float32)
        if P > 0:
            gate = head_gate(gate_ptr, b, bh, GATE_PER_HEAD)
            dgate = tl.zeros([BLOCK_S], tl.float32)
            for start in range(0, P, BLOCK_P):
                cols = start + tl.arange(0, BLOCK_P)
                k = prefix_tile(
                    prefix_k_ptrs, index_ptrs, b, g, cols, q_ptr,
                    G, E, BEGINS, LENGTHS, BLOCK_P, BLOCK_E,
                )  # fmt: skip
                v = prefix_tile(
                    prefix_v_ptrs, index_ptrs, b, g, cols, q_ptr,
                    G, E, BEGINS, LENGTHS, BLOCK_P, BLOCK_E,
                )  # fmt: skip
                zeros = tl.zeros([BLOCK_S, BLOCK_P], tl.float32)
                raw = product(q, tl.trans(k), zeros) * scale
                p = probability(raw * gate, lse[:, None], q)
                p = tl.where((cols < P)[None, :], p, 0.0)
                raw_dp = product(dout, tl.trans(v), zeros)
                dropped, dp = p, raw_dp * gate
                if HAS_DROPOUT:
                    keep = keep_mask(
                        row + rows, start, seed_low, seed_high, threshold, P + N, BLOCK_P
                    )
                    dropped, dp = kept(p, keep, keep_scale), kept(dp, keep, keep_scale)
                ds = p * (dp - delta[:, None])
                dgate += tl.sum(ds * raw + dropped * raw_dp, axis=1)
                dq = product((ds * gate).to(k.dtype), k, dq)
            if dgate_ptr is not None:
                dgate = tl.where(row_ok, dgate, 0.0)
                tl.store(dgate_ptr + bh.to(tl.int64) * tiles + tile, tl.sum(dgate, axis=0))
        if dq_ptr is not None:
            all_seen, length = seen_keys(lengths_ptr, mask_ptr, b, N)
            begin, clean, end = key_range(
                first, all_seen, length, S, N, IS_CAUSAL, SHIFT, BLOCK_S, BLOCK_N
            )
            dq = _dq_tiles(
                dq, q, dout, lse, delta, k_ptr, v_ptr, mask_ptr, bias_ptr, bias_stride_s,
                begin, clean, first, row, k_stride_n, v_stride_n, S, N, length, scale,
                seed_low, seed_high, threshold, keep_scale,
                P, E, IS_CAUSAL, HAS_DROPOUT, False, BLOCK_S, BLOCK_N, BLOCK_E,
            )  # fmt: skip
            dq = _dq_tiles(
                dq, q, dout, lse, delta, k_ptr, v_ptr, mask_ptr, bias_ptr, bias_stride_s,
                clean, end, first, row, k_stride_n, v_stride_n, S, N, length, scale,
                seed_low, seed_high, threshold, keep_scale,
                P, E, IS_CAUSAL, HAS_DROPOUT, True, BLOCK_S, BLOCK_N, BLOCK_E,
            )  # fmt: skip
            at = dq_ptr + row * E + rows[:, None] * E + e[None, :]
            dq_ok = row_ok[:, None] & (e < E)[None, :]
            tl.store(at, (dq * scale).to(dq_ptr.dtype.element_ty), mask=dq_ok)


@triton.jit(
    do_not_specialize=["S", "N", "samples", "row_tiles", "seed_low", "seed_high", "threshold"]
)
def _prefix_attention_bwd_bias_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, lengths_ptr, bias_ptr, lse_ptr, dout_ptr, delta_ptr, dbias_ptr,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_g, k_stride_n,
    v_stride_b, v_stride_g, v_stride_n, bias_stride_b, bias_stride_h, bias_stride_s,
    S, N, samples, row_tiles, scale, seed_low, seed_high, threshold, keep_scale,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, P: tl.constexpr,
    BIAS_HEADS: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One tile of the bias's gradient: the sum of ds over ``samples`` samples (B, or 1 where each
    has its own bias) and over the heads that share it.
    """
    pid = tl.program_id(0)
    key_tiles = (N + SHIFT + BLOCK_N - 1) // BLOCK_N
    start = (pid % key_tiles) * BLOCK_N - SHIFT
    pid = pid // key_tiles
    first = (pid % row_tiles) * BLOCK_S
    which = pid // row_tiles  # of [bias batch, BIAS_HEADS]
    SHARING: tl.constexpr = H // BIAS_HEADS
    i, j = first + tl.arange(0, BLOCK_S), start + tl.arange(0, BLOCK_N)
    row_ok = i < S
    dbias = tl.zeros([BLOCK_S, BLOCK_N], tl.float32)
    for n in range(samples * SHARING):
        b = (which // BIAS_HEADS + n // SHARING).to(tl.int64)
        h = (which % BIAS_HEADS + n % SHARING).to(tl.int64)
        g = h // (H // G)
        row = (b * H + h) * S + first
        head_mask = mask_ptr
        if mask_ptr is not None:
            head_mask += b * N
        q = row_tile(
            q_ptr + b * q_stride_b + h * q_stride_h, first, q_stride_s, S,
            E, BLOCK_S, BLOCK_E, True,
        )  # fmt: skip
        k = row_tile(
            k_ptr + b * k_stride_b + g * k_stride_g, start, k_stride_n, N,
            E, BLOCK_N, BLOCK_E, True,
        )  # fmt: skip
        v = row_tile(
            v_ptr + b * v_stride_b + g * v_stride_g, start, v_stride_n, N,
            E, BLOCK_N, BLOCK_E, True,
        )  # fmt: skip
        dout = row_tile(dout_ptr + row * E, 0, E, S - first, E, BLOCK_S, BLOCK_E, True)
        _, length = seen_keys(lengths_ptr, None, b, N)
        k = without_hidden(k, j, head_mask, length, N, True)
        v = without_hidden(v, j, head_mask, length, N, True)
        zeros = tl.zeros([BLOCK_S, BLOCK_N], tl.float32)
        scores = own_scores(
            product(q, tl.trans(k), zeros), i[:, None], j[None, :], head_mask,
            bias_ptr + b * bias_stride_b + h * bias_stride_h, bias_stride_s, S, N,
            length, scale, IS_CAUSAL, True, 1.0,
        )  # fmt: skip
        lse = row_lse(lse_ptr + row, tl.arange(0, BLOCK_S), row_ok)
        p = probability(scores, lse[:, None], q)
        dp = product(dout, tl.trans(v), zeros)
        if HAS_DROPOUT:
            keep = keep_mask(
                row + tl.arange(0, BLOCK_S), P + start, seed_low, seed_high, threshold, P + N,
                BLOCK_N,
            )  # fmt: skip
            dp = kept(dp, keep, keep_scale)
        delta = tl.load(delta_ptr + row + tl.arange(0, BLOCK_S), mask=row_ok, other=0.0)
        dbias += p * (dp - delta[:, None])
    at = dbias_ptr + (which.to(tl.int64) * S + i[:, None]) * N + j[None, :]
    ok = row_ok[:, None] & ((j >= 0) & (j < N))[None, :]
    tl.store(at, dbias.to(dbias_ptr.dtype.element_ty), mask=ok)
