# ruff: noqa: N803, N806  (compile-time constants and the contract's letters are upper case)
"""The second half of gated_adapter's backward in Triton: what is summed over rows, and dx.

See _triton_bwd_rows.py for the formulas and the schedule of all four kernels.
"""

import triton
import triton.language as tl

from .._triton import activate, member, product, sum_kernel, vector
from ._triton_bwd_rows import (
    POST_DOT,
    POST_HAT_DOT,
    POST_MEAN,
    POST_RSTD,
    PRE_DOT,
    PRE_HAT_DOT,
    PRE_MEAN,
    PRE_RSTD,
    ROW_DOT,
    SLOPE,
    dropped_chunk,
)
from ._triton_fwd import ranks_of, row_gate, scale_number, up_chunk

# Launched after the one below: the sums of the shares' parts.
_gated_adapter_bwd_sum_kernel = sum_kernel


@triton.jit(
    do_not_specialize=[
        "N",
        "S",
        "shares",
        "T",
        "rows_per_share",
        "seed_low",
        "seed_high",
        "threshold",
    ]
)
def _gated_adapter_bwd_columns_kernel(
    x_ptr, w_down_ptr, w_up_ptr, b_up_ptr, down_index_ptr, up_index_ptr,
    pre_weight_ptr, pre_bias_ptr, post_weight_ptr, scale_ptr, gate_ptr, gate_weight_ptr,
    dy_ptr, h_ptr, dh_ptr, row_ptr, pool_ptr, dx_ptr, part_ptr,
    N, S, shares, scale_value, skip_below, T, rows_per_share,
    seed_low, seed_high, threshold, keep_scale,
    D: tl.constexpr, R: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr,
    GATE_PER_ROW: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_SKIP: tl.constexpr,
    DOWN_PER_SAMPLE: tl.constexpr, UP_PER_SAMPLE: tl.constexpr,
    PRE_NORM_STEP: tl.constexpr, POST_NORM_STEP: tl.constexpr,
    PART_SIZE: tl.constexpr, W_DOWN: tl.constexpr, W_UP: tl.constexpr, B_DOWN: tl.constexpr,
    B_UP: tl.constexpr, PRE_WEIGHT: tl.constexpr, PRE_BIAS: tl.constexpr,
    POST_WEIGHT: tl.constexpr, POST_BIAS: tl.constexpr, GATE_WEIGHT: tl.constexpr,
    SCALE: tl.constexpr, GATE_BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BLOCK_D columns and BLOCK_R ranks of one share of a group's rows: the share's part of each
    parameter's gradient and, with the first ranks, dx of the columns.

    A part is PART_SIZE floats; W_DOWN ... GATE_BIAS say where in it each gradient lies, -1: not
    wanted.
    """
    chunks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0)
    chunk = pid % chunks
    part = pid // chunks
    rank_blocks: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R if R > 0 else 1
    rank = part % rank_blocks * BLOCK_R  # the first of the program's
    part = part // rank_blocks
    group = part // shares
    begin = (part % shares) * rows_per_share
    end = tl.minimum(begin + rows_per_share, N)
    rows = tl.arange(0, BLOCK_T)
    r = rank + tl.arange(0, BLOCK_R)
    r_ok = r < R
    start_col = chunk * BLOCK_D
    cols = start_col + tl.arange(0, BLOCK_D)
    col_ok = cols < D
    dtype = dh_ptr.dtype.element_ty
    NEEDS_DZ: tl.constexpr = (dx_ptr is not None) or ((PRE_WEIGHT >= 0) or (PRE_BIAS >= 0))
    NEEDS_DU: tl.constexpr = ((W_UP >= 0) or (B_UP >= 0)) or (
        (POST_WEIGHT >= 0) or (POST_BIAS >= 0)
    )
    NEEDS_X: tl.constexpr = ((W_DOWN >= 0) or (GATE_WEIGHT >= 0)) or (
        (pre_weight_ptr is not None) and NEEDS_DZ
    )

    down = member(down_index_ptr, group, DOWN_PER_SAMPLE)
    up = member(up_index_ptr, group, UP_PER_SAMPLE)
    w_up_ptr += up * D * R
    if b_up_ptr is not None:
        b_up_ptr += up * D
    w_down_ptr += down * R * D
    if NEEDS_DZ and R <= BLOCK_R:
        w_at = w_down_ptr + r[:, None] * D + cols[None, :]
        w_down = tl.load(w_at, mask=r_ok[:, None] & col_ok[None, :], other=0.0).to(dtype)
    if pre_weight_ptr is not None:
        pre_weight = vector(pre_weight_ptr + down * PRE_NORM_STEP, cols, col_ok)
        pre_bias = vector(pre_bias_ptr + down * PRE_NORM_STEP, cols, col_ok)
    if post_weight_ptr is not None:
        post_weight = vector(post_weight_ptr + up * POST_NORM_STEP, cols, col_ok)
    if gate_weight_ptr is not None:
        gate_weight = vector(gate_weight_ptr, cols, col_ok)
    number = scale_number(scale_ptr, scale_value)

    dw_down = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    dw_up = tl.zeros([BLOCK_D, BLOCK_R], tl.float32)
    db_down = tl.zeros([BLOCK_R], tl.float32)
    db_up = tl.zeros([BLOCK_D], tl.float32)
    dpre_weight = tl.zeros([BLOCK_D], tl.float32)
    dpre_bias = tl.zeros([BLOCK_D], tl.float32)
    dpost_weight = tl.zeros([BLOCK_D], tl.float32)
    dpost_bias = tl.zeros([BLOCK_D], tl.float32)
    dgate_weight = tl.zeros([BLOCK_D], tl.float32)
    dscale = tl.zeros([BLOCK_T], tl.float32)
    dgate_bias = tl.zeros([BLOCK_T], tl.float32)

    at = rows[:, None] * D + cols[None, :]  # in a tile: 32 bits keep the addresses cheap
    for first in range(begin, end, BLOCK_T):
        row_ok = rows < end - first
        t0 = group.to(tl.int64) * N + first
        t = t0 + rows
        ok = row_ok[:, None] & col_ok[None, :]
        gate = row_gate(t, row_ok, S, gate_ptr, GATE_PER_ROW, BLOCK_T)
        factor = number * gate
        if HAS_SKIP:
            factor = tl.where(gate >= skip_below, factor, 0.0)
        dh = ranks_of(dh_ptr + t0 * R, rows, row_ok, rank, R, BLOCK_R)
        dy, dropped = dropped_chunk(
            dy_ptr + t0 * D, t, rows, ok, start_col, seed_low, seed_high, threshold, keep_scale,
            D, HAS_DROPOUT, BLOCK_D,
        )  # fmt: skip
        if NEEDS_X:
            x = tl.load(x_ptr + t0 * D + at, mask=ok, other=0.0)

        if NEEDS_DU:
            h = ranks_of(h_ptr + t0 * R, rows, row_ok, rank, R, BLOCK_R).to(tl.float32)
            a = activate(h, ACTIVATION).to(dtype)
            du = factor[:, None] * dropped
            if post_weight_ptr is not None:
                u = up_chunk(
                    a, h_ptr + t0 * R, rows, row_ok, w_up_ptr, b_up_ptr, start_col,
                    ACTIVATION, D, R, BLOCK_T, BLOCK_D, BLOCK_R,
                )  # fmt: skip
                mean = vector(row_ptr, POST_MEAN * T + t, row_ok)
                rstd = vector(row_ptr, POST_RSTD * T + t, row_ok)
                hat = (u - mean[:, None]) * rstd[:, None]
                dpost_weight += tl.sum(du * hat, axis=0)
                dpost_bias += tl.sum(du, axis=0)
                dot = vector(row_ptr, POST_DOT * T + t, row_ok)
                hat_dot = vector(row_ptr, POST_HAT_DOT * T + t, row_ok)
                du = du * post_weight[None, :] - dot[:, None] - hat * hat_dot[:, None]
                du = rstd[:, None] * du
            if W_UP >= 0:
                dw_up = product(tl.trans(du.to(dtype)), a, dw_up)
            db_up += tl.sum(du, axis=0)

        if pre_weight_ptr is not None and NEEDS_X:
            mean = vector(row_ptr, PRE_MEAN * T + t, row_ok)
            rstd = vector(row_ptr, PRE_RSTD * T + t, row_ok)
            hat = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
        if W_DOWN >= 0:
            z = x
            if pre_weight_ptr is not None:
                z = (hat * pre_weight[None, :] + pre_bias[None, :]).to(dtype)
            dw_down = product(tl.trans(dh), z, dw_down)
        db_down += tl.sum(dh.to(tl.float32), axis=0)

        if gate_weight_ptr is not None:
            dlogit = vector(row_ptr, SLOPE * T + t, row_ok)
            if pool_ptr is not None:
                dlogit *= vector(pool_ptr, t // S, row_ok)
            dgate_bias += dlogit
            if GATE_WEIGHT >= 0:
                dgate_weight += tl.sum(dlogit[:, None] * x.to(tl.float32), axis=0)
        if SCALE >= 0:
            dscale += vector(row_ptr, ROW_DOT * T + t, row_ok) * gate * scale_value
        if NEEDS_DZ:  # noqa: SIM102  (decided at compile time)
            if rank == 0:
                dz = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
                if R > BLOCK_R:
                    for other in range(0, R, BLOCK_R):
                        q = other + tl.arange(0, BLOCK_R)
                        w_at = w_down_ptr + q[:, None] * D + cols[None, :]
                        w = tl.load(w_at, mask=(q < R)[:, None] & col_ok[None, :], other=0.0)
                        dh_q = ranks_of(dh_ptr + t0 * R, rows, row_ok, other, R, BLOCK_R)
                        dz = product(dh_q, w.to(dtype), dz)
                else:
                    dz = product(dh, w_down, dz)
                if pre_weight_ptr is not None:
                    dpre_weight += tl.sum(dz * hat, axis=0)
                    dpre_bias += tl.sum(dz, axis=0)
                    dot = vector(row_ptr, PRE_DOT * T + t, row_ok)
                    hat_dot = vector(row_ptr, PRE_HAT_DOT * T + t, row_ok)
                    dz = dz * pre_weight[None, :] - dot[:, None] - hat * hat_dot[:, None]
                    dz = rstd[:, None] * dz
                if gate_weight_ptr is not None:
                    dz += dlogit[:, None] * gate_weight[None, :]
                if RESIDUAL == "input":
                    dz += dy
                if dx_ptr is not None:
                    tl.store(dx_ptr + t0 * D + at, dz.to(dtype), mask=ok)

    part_ptr += part.to(tl.int64) * PART_SIZE
    if W_DOWN >= 0:
        part_at = part_ptr + W_DOWN + r[:, None] * D + cols[None, :]
        tl.store(part_at, dw_down, mask=r_ok[:, None] & col_ok[None, :])
    if W_UP >= 0:
        part_at = part_ptr + W_UP + cols[:, None] * R + r[None, :]
        tl.store(part_at, dw_up, mask=col_ok[:, None] & r_ok[None, :])
    if rank == 0:  # what has no ranks is the same for every block of them
        if B_UP >= 0:
            tl.store(part_ptr + B_UP + cols, db_up, mask=col_ok)
        if PRE_WEIGHT >= 0:
            tl.store(part_ptr + PRE_WEIGHT + cols, dpre_weight, mask=col_ok)
        if PRE_BIAS >= 0:
            tl.store(part_ptr + PRE_BIAS + cols, dpre_bias, mask=col_ok)
        if POST_WEIGHT >= 0:
            tl.store(part_ptr + POST_WEIGHT + cols, dpost_weight, mask=col_ok)
        if POST_BIAS >= 0:
            tl.store(part_ptr + POST_BIAS + cols, dpost_bias, mask=col_ok)
        if GATE_WEIGHT >= 0:
            tl.store(part_ptr + GATE_WEIGHT + cols, dgate_weight, mask=col_ok)
    if chunk == 0:  # what has no columns is the same for every chunk
        if B_DOWN >= 0:
            tl.store(part_ptr + B_DOWN + r, db_down, mask=r_ok)
        if rank == 0:
            if SCALE >= 0:
                tl.store(part_ptr + SCALE, tl.sum(dscale, axis=0))
            if GATE_BIAS >= 0:
                tl.store(part_ptr + GATE_BIAS, tl.sum(dgate_bias, axis=0))
