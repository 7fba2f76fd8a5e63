# ruff: noqa: N803, N806  (compile-time constants and the contract's letters are upper case)
"""The forward kernel of gated_adapter in Triton.

    h = W_down pre_norm(x) + b_down
    y = residual + scale · g · dropout(post_norm( W_up φ(h) + b_up ))

A program owns BLOCK_T rows of one group (a group is a sample where banks are picked per sample or
the gate is pooled, else all T rows) and streams D twice in chunks of BLOCK_D:

    x [BLOCK_T, BLOCK_D] --w_down--> h [BLOCK_T, BLOCK_R] in registers --φ, w_up--> y [.., BLOCK_D]

so x is read once, y written once, and h never leaves the chip between the two products. A given
gate or a token's own gate is known by the end of the first stream: one launch, `PART` "all".

A pooled gate needs the whole sentence. Programs of one Triton launch cannot wait for each other
(nothing promises that they run at the same time), so the work is cut at h, which has to be written
anyway for backward: "down" stores h and the rows' sigmoids, "up" pools those of its sentence and
goes on from h. That costs R / D of a pass. With skip_below the cut is before the first product
instead: "gates" reads x and multiplies no matrices, "all" then skips tiles below the limit.

A bottleneck above BLOCK_R takes a stream over x for each block of its ranks, and the second product
reads the blocks of h again from memory.

Norms take one more stream each over x or over u = W_up φ(h) + b_up, for their statistics: u of a
row does not fit on the chip. Sums, norms, gates and the residual are float32; y is rounded once. h
is rounded before φ, so that backward sees the φ(h) that forward used.
"""

import triton
import triton.language as tl

from .._triton import activate, keep_mask, member, merge_moments, product, row_norm, vector


@triton.jit
def scale_number(scale_ptr, scale_value):
    """scale as a float32 scalar."""
    number = tl.full([], 1.0, tl.float32) * scale_value
    if scale_ptr is not None:
        number *= tl.load(scale_ptr).to(tl.float32)
    return number


@triton.jit
def row_gate(t, row_ok, S, gate_ptr, GATE_PER_ROW: tl.constexpr, BLOCK_T: tl.constexpr):
    """The gates of rows t [BLOCK_T], from a gate of each row [B, S] or of each sentence [B]; 1
    without one.
    """
    gate = tl.full([BLOCK_T], 1.0, tl.float32)
    if gate_ptr is not None:
        at = t if GATE_PER_ROW else t // S
        gate = vector(gate_ptr, at, row_ok)
    return gate


@triton.jit
def _pooled_gate(row_gate_ptr, mask_ptr, group, S, IS_MASKED: tl.constexpr):
    """The gate of sentence ``group``: the mean of its rows' gates, of the real ones if masked."""
    total = tl.zeros([256], tl.float32)
    count = tl.zeros([256], tl.float32)
    for start in range(0, S, 256):
        s = start + tl.arange(0, 256)
        real = s < S
        if IS_MASKED:
            real &= tl.load(mask_ptr + group * S + s, mask=real, other=0) != 0
        total += vector(row_gate_ptr, group * S + s, real)
        count += real.to(tl.float32)
    return tl.sum(total, axis=0) / tl.maximum(tl.sum(count, axis=0), 1.0)


@triton.jit
def _project_down(
    x_ptr, w_down_ptr, b_down_ptr, pre_weight_ptr, pre_bias_ptr, gate_weight_ptr, gate_bias_ptr,
    rows, row_ok, mean, rstd,
    RANK: tl.constexpr, D: tl.constexpr, R: tl.constexpr, HAS_PRODUCT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """h [BLOCK_T, BLOCK_R] of the ranks from RANK on and, with the first of them, the rows' gates
    [BLOCK_T], from one stream over x; pointers are the tile's and the bank member's, mean and rstd
    a pre-norm's.
    """
    r = RANK + tl.arange(0, BLOCK_R)
    HAS_GATE: tl.constexpr = (gate_weight_ptr is not None) and (RANK == 0)
    h = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    logit = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        col_ok = cols < D
        ok = row_ok[:, None] & col_ok[None, :]
        x = tl.load(x_ptr + rows[:, None] * D + cols[None, :], mask=ok, other=0.0)
        if HAS_GATE:
            weight = vector(gate_weight_ptr, cols, col_ok)
            logit += tl.sum(x.to(tl.float32) * weight[None, :], axis=1)
        if HAS_PRODUCT:
            z = x
            if pre_weight_ptr is not None:
                normed = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
                normed = normed * vector(pre_weight_ptr, cols, col_ok)[None, :]
                z = (normed + vector(pre_bias_ptr, cols, col_ok)[None, :]).to(x.dtype)
            w_ok = (r < R)[None, :] & col_ok[:, None]
            w = tl.load(w_down_ptr + r[None, :] * D + cols[:, None], mask=w_ok, other=0.0)
            h = product(z, w.to(x.dtype), h)
    if b_down_ptr is not None and HAS_PRODUCT:
        h += vector(b_down_ptr, r, r < R)[None, :]
    if gate_bias_ptr is not None:
        logit += tl.load(gate_bias_ptr).to(tl.float32)
    return h, tl.sigmoid(logit)


@triton.jit
def _make_hidden(
    x_ptr, w_down_ptr, b_down_ptr, pre_weight_ptr, pre_bias_ptr, gate_weight_ptr, gate_bias_ptr,
    h_ptr, rows, row_ok, has_work, pre_eps,
    D: tl.constexpr, R: tl.constexpr, HAS_PRODUCT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """h of a tile to memory, zeros if it has no work; returns its last block of ranks and the rows'
    gates. Without HAS_PRODUCT the gates are all.
    """
    dtype = h_ptr.dtype.element_ty
    h = tl.zeros([BLOCK_T, BLOCK_R], dtype)
    gate = tl.zeros([BLOCK_T], tl.float32)
    mean = tl.zeros([BLOCK_T], tl.float32)
    rstd = tl.zeros([BLOCK_T], tl.float32)
    if pre_weight_ptr is not None and HAS_PRODUCT:  # noqa: SIM102  (decided at compile time)
        if has_work:
            mean, rstd = row_norm(x_ptr, rows, row_ok, pre_eps, D, BLOCK_T, BLOCK_D)
    # One pass, of nothing, where R is 0: the gates are made in the first.
    for rank in tl.static_range(0, R if HAS_PRODUCT and R > 0 else 1, BLOCK_R):
        if has_work:
            wide, own_gate = _project_down(
                x_ptr, w_down_ptr, b_down_ptr, pre_weight_ptr, pre_bias_ptr,
                gate_weight_ptr, gate_bias_ptr, rows, row_ok, mean, rstd,
                rank, D, R, HAS_PRODUCT, BLOCK_T, BLOCK_D, BLOCK_R,
            )  # fmt: skip
            h = wide.to(dtype)
            if rank == 0:
                gate = own_gate
        if HAS_PRODUCT:
            r = rank + tl.arange(0, BLOCK_R)
            ok = row_ok[:, None] & (r < R)[None, :]
            tl.store(h_ptr + rows[:, None] * R + r[None, :], h, mask=ok)
    if R > BLOCK_R:
        tl.debug_barrier()  # other threads read the blocks of h that these have written
    return h, gate


@triton.jit
def ranks_of(ptr, rows, row_ok, rank, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """[BLOCK_T, BLOCK_R] of h or dh, the ranks from ``rank`` on; ptr is the tile's first row."""
    r = rank + tl.arange(0, BLOCK_R)
    ok = row_ok[:, None] & (r < R)[None, :]
    return tl.load(ptr + rows[:, None] * R + r[None, :], mask=ok, other=0.0)


@triton.jit
def _up_weight(w_up_ptr, cols, rank, D: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr):
    """W_upᵀ [BLOCK_R, BLOCK_D] of the ranks from ``rank`` on."""
    r = rank + tl.arange(0, BLOCK_R)
    ok = (r < R)[:, None] & (cols < D)[None, :]
    return tl.load(w_up_ptr + cols[None, :] * R + r[:, None], mask=ok, other=0.0)


@triton.jit
def up_chunk(
    a, h_ptr, rows, row_ok, w_up_ptr, b_up_ptr, start,
    ACTIVATION: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """u [BLOCK_T, BLOCK_D] = φ(h) W_upᵀ + b_up of the columns start ... start + BLOCK_D. a is φ(h),
    or where that has several blocks of ranks one of them: then h is read from memory.
    """
    cols = start + tl.arange(0, BLOCK_D)
    u = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    if R > BLOCK_R:
        for rank in range(0, R, BLOCK_R):
            h = ranks_of(h_ptr, rows, row_ok, rank, R, BLOCK_R).to(tl.float32)
            w = _up_weight(w_up_ptr, cols, rank, D, R, BLOCK_R).to(a.dtype)
            u = product(activate(h, ACTIVATION).to(a.dtype), w, u)
    else:
        u = product(a, _up_weight(w_up_ptr, cols, 0, D, R, BLOCK_R).to(a.dtype), u)
    if b_up_ptr is not None:
        u += vector(b_up_ptr, cols, cols < D)[None, :]
    return u


@triton.jit
def up_norm(
    a, h_ptr, rows, row_ok, w_up_ptr, b_up_ptr, eps,
    ACTIVATION: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Mean and 1 / standard deviation of the rows of u = φ(h) W_upᵀ + b_up."""
    mean = tl.zeros([BLOCK_T], tl.float32)
    m2 = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, D, BLOCK_D):
        u = up_chunk(
            a, h_ptr, rows, row_ok, w_up_ptr, b_up_ptr, start,
            ACTIVATION, D, R, BLOCK_T, BLOCK_D, BLOCK_R,
        )  # fmt: skip
        col_ok = start + tl.arange(0, BLOCK_D) < D
        mean, m2 = merge_moments(mean, m2, u, col_ok, start)
    return mean, tl.rsqrt(m2 / D + eps)


# Batches change their sizes: an argument that is 1 or a multiple of 16 must not compile anew.
@triton.jit(do_not_specialize=["N", "S", "tiles", "seed_low", "seed_high", "threshold"])
def _gated_adapter_fwd_kernel(
    x_ptr, w_down_ptr, b_down_ptr, w_up_ptr, b_up_ptr, down_index_ptr, up_index_ptr,
    pre_weight_ptr, pre_bias_ptr, post_weight_ptr, post_bias_ptr, scale_ptr, gate_ptr,
    gate_weight_ptr, gate_bias_ptr, mask_ptr, residual_ptr,
    y_ptr, gate_value_ptr, h_ptr, row_gate_ptr,
    N, S, tiles, scale_value, pre_eps, post_eps, skip_below,
    seed_low, seed_high, threshold, keep_scale,
    D: tl.constexpr, R: tl.constexpr, ACTIVATION: tl.constexpr, POOLING: tl.constexpr,
    PART: tl.constexpr, READS_GATES: tl.constexpr, GATE_PER_ROW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, HAS_SKIP: tl.constexpr,
    DOWN_PER_SAMPLE: tl.constexpr, UP_PER_SAMPLE: tl.constexpr,
    PRE_NORM_STEP: tl.constexpr, POST_NORM_STEP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile of rows. N: rows of a group; tiles: tiles of a group; residual_ptr is x for "input".
    PRE_NORM_STEP, POST_NORM_STEP: from member to member of a bank of norms; 0: all have one.
    READS_GATES: an earlier launch left a learned gate's row gates in row_gate_ptr [T]; then
    gate_weight_ptr is None.
    """
    pid = tl.program_id(0)
    group = pid // tiles
    first = (pid % tiles) * BLOCK_T  # of the tile in its group
    rows = tl.arange(0, BLOCK_T)  # in the tile: small enough for 32-bit offsets
    row_ok = rows < N - first
    t0 = group.to(tl.int64) * N + first
    t = t0 + rows
    h_ptr += t0 * R
    dtype = y_ptr.dtype.element_ty

    gate = row_gate(t, row_ok, S, gate_ptr, GATE_PER_ROW, BLOCK_T)
    if READS_GATES:
        if POOLING == "token":
            gate = vector(row_gate_ptr, t, row_ok)
        else:
            pooled = _pooled_gate(row_gate_ptr, mask_ptr, group, S, POOLING == "masked_mean")
            gate = tl.full([BLOCK_T], 1.0, tl.float32) * pooled
            tl.store(gate_value_ptr + group, pooled, mask=first == 0)
    active = row_ok
    has_work = True
    if HAS_SKIP:
        active = row_ok & (gate >= skip_below)
        has_work = tl.max(active.to(tl.int32), axis=0) > 0

    if PART == "up":
        h = ranks_of(h_ptr, rows, row_ok, 0, R, BLOCK_R)
    else:
        down = member(down_index_ptr, group, DOWN_PER_SAMPLE)
        w_down_ptr += down * R * D
        if b_down_ptr is not None:
            b_down_ptr += down * R
        if pre_weight_ptr is not None:
            pre_weight_ptr += down * PRE_NORM_STEP
            pre_bias_ptr += down * PRE_NORM_STEP
        h, own_gate = _make_hidden(
            x_ptr + t0 * D, w_down_ptr, b_down_ptr, pre_weight_ptr, pre_bias_ptr,
            gate_weight_ptr, gate_bias_ptr, h_ptr, rows, row_ok, has_work, pre_eps,
            D, R, PART != "gates", BLOCK_T, BLOCK_D, BLOCK_R,
        )  # fmt: skip
        if gate_weight_ptr is not None:
            tl.store(row_gate_ptr + t, own_gate, mask=row_ok)
            gate = own_gate  # read below only where each row has its own gate

    if PART == "up" or PART == "all":
        a = activate(h.to(tl.float32), ACTIVATION).to(dtype)
        factor = scale_number(scale_ptr, scale_value) * gate
        up = member(up_index_ptr, group, UP_PER_SAMPLE)
        w_up_ptr += up * D * R
        if b_up_ptr is not None:
            b_up_ptr += up * D
        if post_weight_ptr is not None:
            post_weight_ptr += up * POST_NORM_STEP
            post_bias_ptr += up * POST_NORM_STEP
            mean, rstd = up_norm(
                a, h_ptr, rows, row_ok, w_up_ptr, b_up_ptr, post_eps,
                ACTIVATION, D, R, BLOCK_T, BLOCK_D, BLOCK_R,
            )  # fmt: skip
        for start in range(0, D, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            col_ok = cols < D
            ok = row_ok[:, None] & col_ok[None, :]
            at = rows[:, None] * D + cols[None, :]
            y = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
            if has_work:
                u = up_chunk(
                    a, h_ptr, rows, row_ok, w_up_ptr, b_up_ptr, start,
                    ACTIVATION, D, R, BLOCK_T, BLOCK_D, BLOCK_R,
                )  # fmt: skip
                if post_weight_ptr is not None:
                    u = (u - mean[:, None]) * rstd[:, None]
                    u = u * vector(post_weight_ptr, cols, col_ok)[None, :]
                    u += vector(post_bias_ptr, cols, col_ok)[None, :]
                if HAS_DROPOUT:
                    keep = keep_mask(t, start, seed_low, seed_high, threshold, D, BLOCK_D)
                    u = tl.where(keep, u * keep_scale, 0.0)
                y = factor[:, None] * u
                if HAS_SKIP:
                    y = tl.where(active[:, None], y, 0.0)
            if residual_ptr is not None:
                y += tl.load(residual_ptr + t0 * D + at, mask=ok, other=0.0).to(tl.float32)
            tl.store(y_ptr + t0 * D + at, y.to(dtype), mask=ok)
