# ruff: noqa: N803  (compile-time constants and the contract's letters are upper case)
"""The backward kernels of gated_adapter in Triton, from x, h and the gate's value.

With f = scale · g of a row, dy' = dy after dropout and u = W_up φ(h) + b_up:

    without a post-norm: du = f dy',  <dy', u> = <dy' W_up, φ(h)> + <dy', b_up>
    with one: û = (u - mean) rstd, n = f dy' weight, du = rstd (n - <n>/D - û <n û>/D)
    dh = (du W_up) φ'(h),  dz = dh W_down,  dx = dy + pre_norm'(dz) + dlogit · gate_weight
    dW_up = duᵀ φ(h),  dW_down = dhᵀ z,  dscale and dg from <dy', u> summed over rows

"rows": a program owns BLOCK_T rows and streams D: du W_up [BLOCK_T, BLOCK_R] in registers. It
leaves dh [T, R] and, per row, what the columns need: <dy', u>, the sigmoid's slope, norm
statistics. "pool": a program per sentence sums <dy', u> for a gate that its rows share.

"columns": a program owns BLOCK_D columns and a fixed share of the rows, so the weights' gradients
[BLOCK_R, BLOCK_D] stay in registers over all of these rows and dx is written on the way. Shares are
summed by "sum" in their order: no atomics, the same bits every time.

x and dy are read twice, dx is written once: 5 passes. Reading them once would need dh of a tile and
all D columns of it on one processor, and then a partial sum of both weights for each tile.

The means of a pre-norm's backward need no further stream: <dz weight> = dh · (W_down weight) and
<dz weight x̂> = dh · (h - b_down - W_down bias).

A bottleneck above BLOCK_R goes by blocks of ranks: "rows" streams dy once for each, and in
"columns" a block is one more dimension of the programs, of which those of the first block make dx.
"""

import triton
import triton.language as tl

from .._triton import (
    activate,
    keep_mask,
    member,
    product,
    row_norm,
    through_activation,
    vector,
)
from ._triton_fwd import ranks_of, row_gate, scale_number, up_chunk, up_norm

# What "rows" leaves for each row: fields of a float32 buffer [FIELDS, T].
ROW_DOT = tl.constexpr(0)  # <dy', u>, for one row
SLOPE = tl.constexpr(
    1
)  # dlogit, or the sigmoid's slope where the sentence's share is still to come
PRE_MEAN, PRE_RSTD = tl.constexpr(2), tl.constexpr(3)
PRE_DOT, PRE_HAT_DOT = tl.constexpr(4), tl.constexpr(5)
POST_MEAN, POST_RSTD = tl.constexpr(6), tl.constexpr(7)
POST_DOT, POST_HAT_DOT = tl.constexpr(8), tl.constexpr(9)
FIELDS = 10


@triton.jit
def dropped_chunk(
    dy_ptr, t, rows, ok, start, seed_low, seed_high, threshold, keep_scale,
    D: tl.constexpr, HAS_DROPOUT: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dy and dy' [BLOCK_T, BLOCK_D] in float32; dy_ptr is the tile's first row."""
    cols = start + tl.arange(0, BLOCK_D)
    dy = tl.load(dy_ptr + rows[:, None] * D + cols[None, :], mask=ok, other=0.0).to(tl.float32)
    dropped = dy
    if HAS_DROPOUT:
        keep = keep_mask(t, start, seed_low, seed_high, threshold, D, BLOCK_D)
        dropped = tl.where(keep, dy * keep_scale, 0.0)
    return dy, dropped


@triton.jit(do_not_specialize=["N", "S", "tiles", "T", "seed_low", "seed_high", "threshold"])
def _gated_adapter_bwd_rows_kernel(
    x_ptr, w_down_ptr, b_down_ptr, w_up_ptr, b_up_ptr, down_index_ptr, up_index_ptr,
    pre_weight_ptr, pre_bias_ptr, post_weight_ptr, post_bias_ptr, scale_ptr, gate_ptr,
    gate_weight_ptr, gate_bias_ptr, mask_ptr,
    dy_ptr, h_ptr, dh_ptr, row_ptr, dgate_ptr,
    N, S, tiles, scale_value, pre_eps, post_eps, skip_below,
    T, seed_low, seed_high, threshold, keep_scale,
    D: tl.constexpr, R: tl.constexpr, ACTIVATION: tl.constexpr, POOLING: tl.constexpr,
    GATE_PER_ROW: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_SKIP: tl.constexpr,
    DOWN_PER_SAMPLE: tl.constexpr, UP_PER_SAMPLE: tl.constexpr,
    PRE_NORM_STEP: tl.constexpr, POST_NORM_STEP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile of rows: dh and the row fields. gate_ptr is the given gate or the learned gate's
    value; dgate_ptr [B, S] only for a given gate of each row.
    """
    pid = tl.program_id(0)
    group = pid // tiles
    first = (pid % tiles) * BLOCK_T
    rows = tl.arange(0, BLOCK_T)
    row_ok = rows < N - first
    t0 = group.to(tl.int64) * N + first
    t = t0 + rows
    dtype = dh_ptr.dtype.element_ty
    x_ptr += t0 * D
    dy_ptr += t0 * D
    h_ptr += t0 * R
    dh_ptr += t0 * R

    number = scale_number(scale_ptr, scale_value)
    gate = row_gate(t, row_ok, S, gate_ptr, GATE_PER_ROW, BLOCK_T)
    factor = number * gate
    if HAS_SKIP:
        factor = tl.where(gate >= skip_below, factor, 0.0)
    h = ranks_of(h_ptr, rows, row_ok, 0, R, BLOCK_R).to(tl.float32)
    a = activate(h, ACTIVATION).to(dtype)
    up = member(up_index_ptr, group, UP_PER_SAMPLE)
    w_up_ptr += up * D * R
    if b_up_ptr is not None:
        b_up_ptr += up * D
    row_dot = tl.zeros([BLOCK_T], tl.float32)

    if post_weight_ptr is not None:
        post_weight_ptr += up * POST_NORM_STEP
        post_bias_ptr += up * POST_NORM_STEP
        mean, rstd = up_norm(
            a, h_ptr, rows, row_ok, w_up_ptr, b_up_ptr, post_eps,
            ACTIVATION, D, R, BLOCK_T, BLOCK_D, BLOCK_R,
        )  # fmt: skip
        dot = tl.zeros([BLOCK_T], tl.float32)
        hat_dot = tl.zeros([BLOCK_T], tl.float32)
        for start in range(0, D, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            col_ok = cols < D
            ok = row_ok[:, None] & col_ok[None, :]
            _, dropped = dropped_chunk(
                dy_ptr, t, rows, ok, start, seed_low, seed_high, threshold, keep_scale,
                D, HAS_DROPOUT, BLOCK_D,
            )  # fmt: skip
            u = up_chunk(
                a, h_ptr, rows, row_ok, w_up_ptr, b_up_ptr, start,
                ACTIVATION, D, R, BLOCK_T, BLOCK_D, BLOCK_R,
            )  # fmt: skip
            hat = (u - mean[:, None]) * rstd[:, None]
            weighted = dropped * vector(post_weight_ptr, cols, col_ok)[None, :]
            dot += tl.sum(weighted, axis=1)
            hat_dot += tl.sum(weighted * hat, axis=1)
            row_dot += tl.sum(dropped * vector(post_bias_ptr, cols, col_ok)[None, :], axis=1)
        row_dot += hat_dot
        dot *= factor / D
        hat_dot *= factor / D
        tl.store(row_ptr + POST_MEAN * T + t, mean, mask=row_ok)
        tl.store(row_ptr + POST_RSTD * T + t, rstd, mask=row_ok)
        tl.store(row_ptr + POST_DOT * T + t, dot, mask=row_ok)
        tl.store(row_ptr + POST_HAT_DOT * T + t, hat_dot, mask=row_ok)

    down = member(down_index_ptr, group, DOWN_PER_SAMPLE)
    w_down_ptr += down * R * D
    if b_down_ptr is not None:
        b_down_ptr += down * R
    if pre_weight_ptr is not None:
        pre_weight_ptr += down * PRE_NORM_STEP
        pre_bias_ptr += down * PRE_NORM_STEP
        pre_dot = tl.zeros([BLOCK_T], tl.float32)
        pre_hat_dot = tl.zeros([BLOCK_T], tl.float32)
    logit = tl.zeros([BLOCK_T], tl.float32)
    for rank in tl.static_range(0, R if R > 0 else 1, BLOCK_R):
        r = rank + tl.arange(0, BLOCK_R)
        r_ok = r < R
        if rank > 0:
            h = ranks_of(h_ptr, rows, row_ok, rank, R, BLOCK_R).to(tl.float32)
            a = activate(h, ACTIVATION).to(dtype)
        v = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
        if pre_weight_ptr is not None:
            weight_sum = tl.zeros([BLOCK_R], tl.float32)  # W_down weight
            bias_sum = tl.zeros([BLOCK_R], tl.float32)  # W_down bias + b_down
            if b_down_ptr is not None:
                bias_sum += vector(b_down_ptr, r, r_ok)
        for start in range(0, D, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            col_ok = cols < D
            ok = row_ok[:, None] & col_ok[None, :]
            _, du = dropped_chunk(
                dy_ptr, t, rows, ok, start, seed_low, seed_high, threshold, keep_scale,
                D, HAS_DROPOUT, BLOCK_D,
            )  # fmt: skip
            if post_weight_ptr is not None:
                u = up_chunk(
                    a, h_ptr, rows, row_ok, w_up_ptr, b_up_ptr, start,
                    ACTIVATION, D, R, BLOCK_T, BLOCK_D, BLOCK_R,
                )  # fmt: skip
                hat = (u - mean[:, None]) * rstd[:, None]
                du = factor[:, None] * du * vector(post_weight_ptr, cols, col_ok)[None, :]
                du = rstd[:, None] * (du - dot[:, None] - hat * hat_dot[:, None])
            elif b_up_ptr is not None and rank == 0:
                row_dot += tl.sum(du * vector(b_up_ptr, cols, col_ok)[None, :], axis=1)
            w_ok = col_ok[:, None] & r_ok[None, :]
            w = tl.load(w_up_ptr + cols[:, None] * R + r[None, :], mask=w_ok, other=0.0)
            v = product(du.to(dtype), w.to(dtype), v)
            if gate_weight_ptr is not None and rank == 0:
                x = tl.load(x_ptr + rows[:, None] * D + cols[None, :], mask=ok, other=0.0)
                weight = vector(gate_weight_ptr, cols, col_ok)
                logit += tl.sum(x.to(tl.float32) * weight[None, :], axis=1)
            if pre_weight_ptr is not None:
                w_ok = r_ok[:, None] & col_ok[None, :]
                w = tl.load(w_down_ptr + r[:, None] * D + cols[None, :], mask=w_ok, other=0.0)
                w = w.to(dtype).to(tl.float32)
                weight_sum += tl.sum(w * vector(pre_weight_ptr, cols, col_ok)[None, :], axis=1)
                bias_sum += tl.sum(w * vector(pre_bias_ptr, cols, col_ok)[None, :], axis=1)

        if post_weight_ptr is None:
            row_dot += tl.sum(v * a.to(tl.float32), axis=1)
            v = factor[:, None] * v
        dh = through_activation(v, h, ACTIVATION).to(dtype)
        h_ok = row_ok[:, None] & r_ok[None, :]
        tl.store(dh_ptr + rows[:, None] * R + r[None, :], dh, mask=h_ok)
        if pre_weight_ptr is not None:
            wide = dh.to(tl.float32)
            pre_dot += tl.sum(wide * weight_sum[None, :], axis=1)
            pre_hat_dot += tl.sum(wide * (h - bias_sum[None, :]), axis=1)
    if pre_weight_ptr is not None:
        mean, rstd = row_norm(x_ptr, rows, row_ok, pre_eps, D, BLOCK_T, BLOCK_D)
        tl.store(row_ptr + PRE_MEAN * T + t, mean, mask=row_ok)
        tl.store(row_ptr + PRE_RSTD * T + t, rstd, mask=row_ok)
        tl.store(row_ptr + PRE_DOT * T + t, pre_dot / D, mask=row_ok)
        tl.store(row_ptr + PRE_HAT_DOT * T + t, pre_hat_dot / D, mask=row_ok)
    tl.store(row_ptr + ROW_DOT * T + t, row_dot, mask=row_ok)
    if gate_weight_ptr is not None:
        s = tl.sigmoid(logit + tl.load(gate_bias_ptr).to(tl.float32))
        slope = s * (1.0 - s)
        if POOLING == "token":
            slope *= row_dot * number
        if POOLING == "masked_mean":
            slope = tl.where(tl.load(mask_ptr + t, mask=row_ok, other=0) != 0, slope, 0.0)
        tl.store(row_ptr + SLOPE * T + t, slope, mask=row_ok)
    if dgate_ptr is not None:
        tl.store(dgate_ptr + t, (row_dot * number).to(dgate_ptr.dtype.element_ty), mask=row_ok)


@triton.jit(do_not_specialize=["S"])
def _gated_adapter_bwd_pool_kernel(
    row_ptr, mask_ptr, scale_ptr, dgate_ptr, pool_ptr, S, scale_value,
    POOLING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One sentence: the gradient dgate of its gate [B], or pool [B] = what each of its rows that
    count has of it.
    """
    sentence = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for start in range(0, S, BLOCK):
        s = start + tl.arange(0, BLOCK)
        real = s < S
        total += vector(row_ptr, sentence * S + s, real)  # ROW_DOT is the first field
        if POOLING == "masked_mean":
            real &= tl.load(mask_ptr + sentence * S + s, mask=real, other=0) != 0
        count += real.to(tl.float32)
    dgate = tl.sum(total, axis=0) * scale_number(scale_ptr, scale_value)
    if dgate_ptr is not None:
        tl.store(dgate_ptr + sentence, dgate.to(dgate_ptr.dtype.element_ty))
    if pool_ptr is not None:
        tl.store(pool_ptr + sentence, dgate / tl.maximum(tl.sum(count, axis=0), 1.0))
