# ruff: noqa: N803, N806, SIM102  (compile-time constants are upper case, their conditions stand alone)
"""The backward kernels of lora_linear in Triton, beside dx = dy W by PyTorch.

    raw = dy B,  ds = scale · g · raw,  dg = scale <raw, s>
    dA = dsᵀ dropout(x),  dB = dyᵀ (scale · g · s),  dx += dropout'(ds A) + dlogit · w

Slots, tiles and groups are forward's (_triton_fwd.py). "rows": a program owns BLOCK_T rows and
streams the columns of dy that some branch reaches; it leaves ds [T, ΣR] and each row's <raw, s>.
Forward keeps no row's sigmoid: where gates are learned its first kernel runs again without
branches. "pool" then turns sigmoids into dlogit, a program per sentence and gate.

"columns_in" owns BLOCK_D columns of x and a fixed share of the rows: dA of them stays in registers
over all of these rows, and dx is completed on the way. "columns_out" does the same for dB over
columns of dy. Shares are summed by "sum" in their order: no atomics, the same bits every time.
"""

import triton
import triton.language as tl

from .._triton import keep_mask, product, sum_kernel, vector
from ._triton_fwd import (
    alone,
    has_any,
    of_branch,
    packed_a,
    packed_b,
    reached,
    slot_factors,
)

# Launched last: the sums of the shares' parts.
_lora_linear_bwd_sum_kernel = sum_kernel


@triton.jit(do_not_specialize=["N", "S", "tiles", "T"])
def _lora_linear_bwd_rows_kernel(
    dy_ptr, s_ptr, b_ptrs, b_index_ptrs, gate_ptrs, scales, ds_ptr, dot_ptr, dgate_ptrs,
    N, S, tiles, T,
    DOUT: tl.constexpr, FIRST: tl.constexpr, CHUNKS: tl.constexpr,
    BEGINS: tl.constexpr, RANKS: tl.constexpr, OFFSETS: tl.constexpr, SIZES: tl.constexpr,
    B_PER_SAMPLE: tl.constexpr, GATE_PER_ROW: tl.constexpr, W: tl.constexpr,
    IS_APART: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One tile of rows: ds [T, W], and for a branch with a gate scale <raw, s> of each row in
    dgate_ptrs[i] [T], or in dot_ptr [branches, T] where that is None.
    """
    pid = tl.program_id(0)
    group = pid // tiles
    first = (pid % tiles) * BLOCK_T
    rows = tl.arange(0, BLOCK_T)
    row_ok = rows < N - first
    t0 = group.to(tl.int64) * N + first
    t = t0 + rows
    slots = tl.arange(0, BLOCK_W)
    dy_ptr += t0 * DOUT

    raw = tl.zeros([BLOCK_T, BLOCK_W], tl.float32)
    for chunk in range(CHUNKS):
        cols = FIRST + chunk * BLOCK_D + tl.arange(0, BLOCK_D)
        ok = row_ok[:, None] & reached(cols, OFFSETS, SIZES)[None, :]
        dy = tl.load(dy_ptr + rows[:, None] * DOUT + cols[None, :], mask=ok, other=0.0)
        b = packed_b(
            b_ptrs, b_index_ptrs, group, slots[None, :], cols[:, None], dy_ptr,
            BEGINS, RANKS, OFFSETS, SIZES, B_PER_SAMPLE,
        )  # fmt: skip
        if IS_APART:
            for i in tl.static_range(len(RANKS)):
                own_cols = of_branch(cols, OFFSETS[i], SIZES[i])
                if has_any(own_cols):
                    own_b = alone(b, of_branch(slots, BEGINS[i], RANKS[i])[None, :])
                    raw = product(alone(dy, own_cols[None, :]), own_b, raw)
        else:
            raw = product(dy, b, raw)

    factors = slot_factors(
        gate_ptrs, scales, t, row_ok, slots, S, BEGINS, RANKS, GATE_PER_ROW, BLOCK_T, BLOCK_W
    )
    at = t0 * W + rows[:, None] * W + slots[None, :]
    ok = row_ok[:, None] & (slots < W)[None, :]
    tl.store(ds_ptr + at, (raw * factors).to(ds_ptr.dtype.element_ty), mask=ok)
    if dot_ptr is not None:
        s = tl.load(s_ptr + at, mask=ok, other=0.0).to(tl.float32)
        for i in tl.static_range(len(RANKS)):
            if gate_ptrs[i] is not None:
                mine = of_branch(slots, BEGINS[i], RANKS[i])
                dot = scales[i] * tl.sum(tl.where(mine[None, :], raw * s, 0.0), axis=1)
                if dgate_ptrs[i] is not None:
                    at_row = dgate_ptrs[i] + t
                    tl.store(at_row, dot.to(dgate_ptrs[i].dtype.element_ty), mask=row_ok)
                else:
                    tl.store(dot_ptr + i * T.to(tl.int64) + t, dot, mask=row_ok)


@triton.jit
def _pool_gate(
    dot_ptr, dvalue_ptr, dgate_ptr, row_gate_ptr, mask_ptr, sentence, S,
    IS_TOKEN: tl.constexpr, IS_MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One gate of one sentence; pointers are the gate's, and the first three may be None.

    Its value's gradient is the sum of dot_ptr [T] over the sentence, or it lies in dvalue_ptr. It
    goes to dgate_ptr [B] for a given gate. For a learned one row_gate_ptr [T] holds sigmoids and
    gets dlogit.
    """
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    if not IS_TOKEN:
        for start in range(0, S, BLOCK):
            s = start + tl.arange(0, BLOCK)
            real = s < S
            if dot_ptr is not None:
                total += vector(dot_ptr + sentence * S, s, real)
            if IS_MASKED:
                real &= tl.load(mask_ptr + sentence * S + s, mask=real, other=0) != 0
            count += real.to(tl.float32)
    dvalue = tl.sum(total, axis=0)
    if dvalue_ptr is not None and not IS_TOKEN:
        dvalue = tl.load(dvalue_ptr + sentence)
    if dgate_ptr is not None:
        tl.store(dgate_ptr + sentence, dvalue.to(dgate_ptr.dtype.element_ty))
    if row_gate_ptr is not None:
        each = dvalue / tl.maximum(tl.sum(count, axis=0), 1.0)
        for start in range(0, S, BLOCK):
            s = start + tl.arange(0, BLOCK)
            real = s < S
            at = sentence * S + s
            gate = vector(row_gate_ptr, at, real)
            share = tl.zeros([BLOCK], tl.float32) + each
            if IS_TOKEN and dvalue_ptr is not None:
                share = vector(dvalue_ptr, at, real)
            elif IS_TOKEN:
                share = vector(dot_ptr, at, real)
            dlogit = share * gate * (1.0 - gate)
            if IS_MASKED:
                counts = tl.load(mask_ptr + at, mask=real, other=0) != 0
                dlogit = tl.where(counts, dlogit, 0.0)
            tl.store(row_gate_ptr + at, dlogit, mask=real)


@triton.jit(do_not_specialize=["B", "S"])
def _lora_linear_bwd_pool_kernel(
    dot_ptr, dvalue_ptrs, dgate_ptrs, row_gate_ptr, mask_ptr, B, S,
    DOTS: tl.constexpr, LEARNED: tl.constexpr, IS_TOKEN: tl.constexpr, IS_MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One sentence of one gate. DOTS: its branch, or -1; LEARNED: its place in row_gate_ptr, or
    -1.
    """
    sentence = (tl.program_id(0) % B).to(tl.int64)
    which = tl.program_id(0) // B
    T = B.to(tl.int64) * S
    for j in tl.static_range(len(DOTS)):
        if which == j:
            dots = None
            if DOTS[j] >= 0:
                dots = dot_ptr + DOTS[j] * T
            row_gates = None
            if LEARNED[j] >= 0:
                row_gates = row_gate_ptr + LEARNED[j] * T
            _pool_gate(
                dots, dvalue_ptrs[j], dgate_ptrs[j], row_gates, mask_ptr, sentence, S,
                IS_TOKEN[j], IS_MASKED[j], BLOCK,
            )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "N", "shares", "T", "rows_per_share", "seed_low", "seed_high", "threshold",
    ]
)  # fmt: skip
def _lora_linear_bwd_columns_in_kernel(
    x_ptr, a_ptrs, a_index_ptrs, gate_weight_ptrs, ds_ptr, dlogit_ptr, mask_ptr, dx_ptr, part_ptr,
    N, shares, T, rows_per_share, seed_low, seed_high, threshold, keep_scale,
    D: tl.constexpr, BEGINS: tl.constexpr, RANKS: tl.constexpr, A_PER_SAMPLE: tl.constexpr,
    W: tl.constexpr, HAS_DROPOUT: tl.constexpr, PART_SIZE: tl.constexpr, A_AT: tl.constexpr,
    WEIGHT_AT: tl.constexpr, BIAS_AT: tl.constexpr, IS_MASKED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """BLOCK_D columns of one share of a group's rows: dx of them, complete, and the share's part of
    dA and of the learned gates' gradients.

    A part is PART_SIZE floats; A_AT, WEIGHT_AT and BIAS_AT say where in it each gradient lies, -1:
    not wanted.
    """
    CHUNKS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    BRANCHES: tl.constexpr = len(RANKS)
    GATES: tl.constexpr = len(gate_weight_ptrs)
    pid = tl.program_id(0)
    chunk = pid % CHUNKS
    part = pid // CHUNKS
    group = part // shares
    begin = (part % shares) * rows_per_share
    end = tl.minimum(begin + rows_per_share, N)
    rows = tl.arange(0, BLOCK_T)
    slots = tl.arange(0, BLOCK_W)
    gates = tl.arange(0, BLOCK_G)
    cols = chunk * BLOCK_D + tl.arange(0, BLOCK_D)
    col_ok = cols < D
    dtype = x_ptr.dtype.element_ty
    if BRANCHES > 0 and dx_ptr is not None:
        a = packed_a(
            a_ptrs, a_index_ptrs, group, slots[:, None], cols[None, :], x_ptr,
            D, BEGINS, RANKS, A_PER_SAMPLE,
        )  # fmt: skip
    da = tl.zeros([BLOCK_W, BLOCK_D], tl.float32)
    dweight = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_G], tl.float32)

    at = rows[:, None] * D + cols[None, :]
    for first in range(begin, end, BLOCK_T):
        row_ok = rows < end - first
        t0 = group.to(tl.int64) * N + first
        t = t0 + rows
        ok = row_ok[:, None] & col_ok[None, :]
        x = tl.load(x_ptr + t0 * D + at, mask=ok, other=0.0)
        if HAS_DROPOUT:
            start = chunk * BLOCK_D
            keep = keep_mask(t, start, seed_low, seed_high, threshold, D, BLOCK_D)
        dx = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        if BRANCHES > 0:
            s_ok = row_ok[:, None] & (slots < W)[None, :]
            ds_at = ds_ptr + t0 * W + rows[:, None] * W + slots[None, :]
            ds = tl.load(ds_at, mask=s_ok, other=0.0)
            z = x
            if HAS_DROPOUT:
                z = tl.where(keep, x.to(tl.float32) * keep_scale, 0.0).to(dtype)
            da = product(tl.trans(ds), z, da)
            if dx_ptr is not None:
                dx = product(ds, a, dx)
                if HAS_DROPOUT:
                    dx = tl.where(keep, dx * keep_scale, 0.0)
        for j in tl.static_range(GATES):
            dlogit = vector(dlogit_ptr, j * T.to(tl.int64) + t, row_ok)
            mine = gates == j
            step = dlogit[:, None] * x.to(tl.float32)
            if IS_MASKED[j]:
                # A row that does not count has no part in a gate, whatever it holds.
                counts = tl.load(mask_ptr + t, mask=row_ok, other=0) != 0
                step = tl.where(counts[:, None], step, 0.0)
            step = tl.sum(step, axis=0)
            dweight += tl.where(mine[:, None], step[None, :], 0.0)
            dbias += tl.where(mine, tl.sum(dlogit, axis=0), 0.0)
            if dx_ptr is not None:
                weight = vector(gate_weight_ptrs[j], cols, col_ok)
                dx += dlogit[:, None] * weight[None, :]
        if dx_ptr is not None:
            dx += tl.load(dx_ptr + t0 * D + at, mask=ok, other=0.0).to(tl.float32)
            tl.store(dx_ptr + t0 * D + at, dx.to(dtype), mask=ok)

    if PART_SIZE > 0:
        part_ptr += part.to(tl.int64) * PART_SIZE
    for i in tl.static_range(BRANCHES):
        if A_AT[i] >= 0:
            row = slots - BEGINS[i]
            a_ok = ((row >= 0) & (row < RANKS[i]))[:, None] & col_ok[None, :]
            tl.store(part_ptr + A_AT[i] + row[:, None] * D + cols[None, :], da, mask=a_ok)
    for j in tl.static_range(GATES):
        if WEIGHT_AT[j] >= 0:
            weight_at = part_ptr + WEIGHT_AT[j] + cols[None, :] + 0 * gates[:, None]
            tl.store(weight_at, dweight, mask=(gates == j)[:, None] & col_ok[None, :])
        if BIAS_AT[j] >= 0:
            if chunk == 0:  # the same for every chunk
                tl.store(part_ptr + BIAS_AT[j] + 0 * gates, dbias, mask=gates == j)


@triton.jit(do_not_specialize=["N", "S", "shares", "rows_per_share"])
def _lora_linear_bwd_columns_out_kernel(
    dy_ptr, s_ptr, gate_ptrs, scales, part_ptr,
    N, S, shares, rows_per_share,
    DOUT: tl.constexpr, FIRST: tl.constexpr, CHUNKS: tl.constexpr,
    BEGINS: tl.constexpr, RANKS: tl.constexpr, OFFSETS: tl.constexpr, SIZES: tl.constexpr,
    GATE_PER_ROW: tl.constexpr, W: tl.constexpr, PART_SIZE: tl.constexpr, B_AT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """BLOCK_D columns of dy and one share of a group's rows: the share's part of dB."""
    pid = tl.program_id(0)
    cols = FIRST + (pid % CHUNKS) * BLOCK_D + tl.arange(0, BLOCK_D)
    part = pid // CHUNKS
    group = part // shares
    begin = (part % shares) * rows_per_share
    end = tl.minimum(begin + rows_per_share, N)
    rows = tl.arange(0, BLOCK_T)
    slots = tl.arange(0, BLOCK_W)
    col_ok = reached(cols, OFFSETS, SIZES)
    if has_any(col_ok):
        db = tl.zeros([BLOCK_D, BLOCK_W], tl.float32)
        for first in range(begin, end, BLOCK_T):
            row_ok = rows < end - first
            t0 = group.to(tl.int64) * N + first
            dy_at = dy_ptr + t0 * DOUT + rows[:, None] * DOUT + cols[None, :]
            dy = tl.load(dy_at, mask=row_ok[:, None] & col_ok[None, :], other=0.0)
            s_ok = row_ok[:, None] & (slots < W)[None, :]
            s_at = s_ptr + t0 * W + rows[:, None] * W + slots[None, :]
            s = tl.load(s_at, mask=s_ok, other=0.0)
            factors = slot_factors(
                gate_ptrs, scales, t0 + rows, row_ok, slots, S,
                BEGINS, RANKS, GATE_PER_ROW, BLOCK_T, BLOCK_W,
            )  # fmt: skip
            s = (s.to(tl.float32) * factors).to(dy.dtype)
            db = product(tl.trans(dy), s, db)
        part_ptr += part.to(tl.int64) * PART_SIZE
        for i in tl.static_range(len(RANKS)):
            if B_AT[i] >= 0:
                col, r = cols - OFFSETS[i], slots - BEGINS[i]
                ok = ((col >= 0) & (col < SIZES[i]))[:, None] & ((r >= 0) & (r < RANKS[i]))[None, :]
                b_at = part_ptr + B_AT[i] + col[:, None] * RANKS[i] + r[None, :]
                tl.store(b_at, db, mask=ok)
