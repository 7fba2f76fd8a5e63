# ruff: noqa: N803, N806, SIM102  (compile-time constants are upper case, their conditions stand alone)
"""The forward kernels of lora_linear in Triton, around a base product y = x Wᵀ + b by PyTorch.

    s = dropout(x) Aᵀ,  g = pool(sigmoid(w · x + c)),  y += scale · g · s Bᵀ

All branches and learned gates are one skinny matrix: branch i has the *slots* begin_i ... begin_i +
R_i, in the order of the saved s [T, ΣR], and the gates' weights follow. Its tiles are gathered from
the parameters where they lie, masked, so nothing is packed in memory, and branches that share
columns simply meet in one product. Branches that reach different columns ("apart") have a product
each, of the tiles they reach, so that what is not finite in one stays in its columns.

"shrink": a program owns BLOCK_T rows of one group (a group is a sample where banks are picked per
sample, else all T rows) and streams x once: s and every row's sigmoids. "pool": a program per
sentence and pooled gate. "expand": a program owns a tile of y's columns that some branch reaches,
and adds to it in place.

Gates see x, branches see dropout(x): with dropout, and where gates would double the padded width,
they have a product of their own on the same tile of x. Products, sums and gates are float32; s is
rounded to the activation's dtype, since backward has to see the s that forward used.
"""

import triton
import triton.language as tl

from .._triton import keep_mask, member, product, vector


@triton.jit
def packed_a(
    a_ptrs, a_index_ptrs, group, slots, cols, like_ptr,
    D: tl.constexpr, BEGINS: tl.constexpr, RANKS: tl.constexpr, A_PER_SAMPLE: tl.constexpr,
):  # fmt: skip
    """Every branch's A at ``slots`` and ``cols`` (2D, they broadcast), 0 elsewhere, in the dtype
    behind ``like_ptr``.
    """
    dtype = like_ptr.dtype.element_ty
    found = tl.zeros_like(slots + cols).to(dtype)
    for i in tl.static_range(len(RANKS)):
        row = slots - BEGINS[i]
        ok = ((row >= 0) & (row < RANKS[i])) & (cols < D)
        a_ptr = a_ptrs[i] + member(a_index_ptrs[i], group, A_PER_SAMPLE[i]) * (RANKS[i] * D)
        found = tl.where(ok, tl.load(a_ptr + row * D + cols, mask=ok, other=0.0).to(dtype), found)
    return found


@triton.jit
def packed_gates(gate_weight_ptrs, found, slots, cols, D: tl.constexpr, FIRST: tl.constexpr):
    """``found`` [cols, slots] with the gates' weights at the slots from FIRST on."""
    for j in tl.static_range(len(gate_weight_ptrs)):
        weight = tl.load(gate_weight_ptrs[j] + cols, mask=cols < D, other=0.0).to(found.dtype)
        found = tl.where((slots == FIRST + j)[None, :], weight[:, None], found)
    return found


@triton.jit
def packed_b(
    b_ptrs, b_index_ptrs, group, slots, cols, like_ptr,
    BEGINS: tl.constexpr, RANKS: tl.constexpr, OFFSETS: tl.constexpr, SIZES: tl.constexpr,
    B_PER_SAMPLE: tl.constexpr,
):  # fmt: skip
    """Every branch's B at ``slots`` and at ``cols`` of the output (2D, they broadcast), 0
    elsewhere, in the dtype behind ``like_ptr``.
    """
    dtype = like_ptr.dtype.element_ty
    found = tl.zeros_like(slots + cols).to(dtype)
    for i in tl.static_range(len(RANKS)):
        r, col = slots - BEGINS[i], cols - OFFSETS[i]
        ok = ((r >= 0) & (r < RANKS[i])) & ((col >= 0) & (col < SIZES[i]))
        which = member(b_index_ptrs[i], group, B_PER_SAMPLE[i])
        b_ptr = b_ptrs[i] + which * (SIZES[i] * RANKS[i])
        loaded = tl.load(b_ptr + col * RANKS[i] + r, mask=ok, other=0.0).to(dtype)
        found = tl.where(ok, loaded, found)
    return found


@triton.jit
def of_branch(at, first, count):
    """Which slots, or columns of the output, are among a branch's."""
    return (at >= first) & (at < first + count)


@triton.jit
def has_any(which):
    """Is one of a vector's elements true?"""
    return tl.max(which.to(tl.int32), axis=0) > 0


@triton.jit
def alone(tile, own):
    """A tile with zeros for all that is not a branch's own: what is not finite there stays out of
    its product.
    """
    return tl.where(own, tile, tl.zeros_like(tile))


@triton.jit
def reached(cols, OFFSETS: tl.constexpr, SIZES: tl.constexpr):
    """Which columns of the output some branch reaches."""
    found = cols < 0
    for i in tl.static_range(len(SIZES)):
        found |= of_branch(cols, OFFSETS[i], SIZES[i])
    return found


@triton.jit
def slot_factors(
    gate_ptrs, scales, t, row_ok, slots, S,
    BEGINS: tl.constexpr, RANKS: tl.constexpr, GATE_PER_ROW: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """scale · g of rows t for the branch of each slot, [BLOCK_T, BLOCK_W] float32; 0 after the last
    branch.
    """
    found = tl.zeros([BLOCK_T, BLOCK_W], tl.float32)
    for i in tl.static_range(len(RANKS)):
        factor = tl.zeros([BLOCK_T], tl.float32) + scales[i]
        if gate_ptrs[i] is not None:
            at = t
            if not GATE_PER_ROW[i]:
                at = t.to(tl.int32) // S
            factor *= vector(gate_ptrs[i], at, row_ok)
        mine = of_branch(slots, BEGINS[i], RANKS[i])
        found = tl.where(mine[None, :], factor[:, None], found)
    return found


# Batches change their sizes: an argument that is 1 or a multiple of 16 must not compile again.
@triton.jit(do_not_specialize=["N", "tiles", "T", "seed_low", "seed_high", "threshold"])
def _lora_linear_shrink_kernel(
    x_ptr, a_ptrs, a_index_ptrs, gate_weight_ptrs, gate_bias_ptrs,
    s_ptr, token_ptrs, row_gate_ptr,
    N, tiles, T, seed_low, seed_high, threshold, keep_scale,
    D: tl.constexpr, BEGINS: tl.constexpr, RANKS: tl.constexpr, A_PER_SAMPLE: tl.constexpr,
    W: tl.constexpr, HAS_DROPOUT: tl.constexpr, GATES_APART: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One tile of rows: s [T, W], and the sigmoids of learned gate j of each row in token_ptrs[j]
    [T], or in row_gate_ptr [gates, T] where that is None. N: rows of a group; tiles: its tiles.
    """
    pid = tl.program_id(0)
    group = pid // tiles
    first = (pid % tiles) * BLOCK_T
    rows = tl.arange(0, BLOCK_T)
    row_ok = rows < N - first
    t0 = group.to(tl.int64) * N + first
    t = t0 + rows
    x_ptr += t0 * D
    slots = tl.arange(0, BLOCK_W)
    gate_slots = tl.arange(0, 16)
    GATES: tl.constexpr = len(gate_weight_ptrs)
    BRANCHES: tl.constexpr = len(RANKS)

    wide = tl.zeros([BLOCK_T, BLOCK_W], tl.float32)
    logits = tl.zeros([BLOCK_T, 16], tl.float32)
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        ok = row_ok[:, None] & (cols < D)[None, :]
        x = tl.load(x_ptr + rows[:, None] * D + cols[None, :], mask=ok, other=0.0)
        if GATES > 0 and GATES_APART:
            w = tl.zeros([BLOCK_D, 16], x.dtype)
            w = packed_gates(gate_weight_ptrs, w, gate_slots, cols, D, 0)
            logits = product(x, w, logits)
        if BRANCHES > 0:
            z = x
            if HAS_DROPOUT:
                keep = keep_mask(t, start, seed_low, seed_high, threshold, D, BLOCK_D)
                z = tl.where(keep, x.to(tl.float32) * keep_scale, 0.0).to(x.dtype)
            w = packed_a(
                a_ptrs, a_index_ptrs, group, slots[None, :], cols[:, None], x_ptr,
                D, BEGINS, RANKS, A_PER_SAMPLE,
            )  # fmt: skip
            if GATES > 0 and not GATES_APART:
                w = packed_gates(gate_weight_ptrs, w, slots, cols, D, W)
            wide = product(z, w, wide)

    if BRANCHES > 0:
        s_at = s_ptr + t0 * W + rows[:, None] * W + slots[None, :]
        tl.store(s_at, wide.to(s_ptr.dtype.element_ty), mask=row_ok[:, None] & (slots < W)[None, :])
    for j in tl.static_range(GATES):
        if GATES_APART:
            logit = tl.sum(tl.where((gate_slots == j)[None, :], logits, 0.0), axis=1)
        else:
            logit = tl.sum(tl.where((slots == W + j)[None, :], wide, 0.0), axis=1)
        gate = tl.sigmoid(logit + tl.load(gate_bias_ptrs[j]).to(tl.float32))
        if token_ptrs[j] is not None:
            tl.store(token_ptrs[j] + t, gate, mask=row_ok)
        else:
            tl.store(row_gate_ptr + j * T.to(tl.int64) + t, gate, mask=row_ok)


@triton.jit(do_not_specialize=["B", "S"])
def _lora_linear_pool_kernel(
    row_gate_ptr, mask_ptr, value_ptrs, B, S, IS_MASKED: tl.constexpr, BLOCK: tl.constexpr
):
    """The mean of a sentence's row gates, of its real rows if IS_MASKED, for one of the gates whose
    value [B] is wanted (None: not this one).
    """
    sentence = (tl.program_id(0) % B).to(tl.int64)
    which = tl.program_id(0) // B
    for j in tl.static_range(len(IS_MASKED)):
        if value_ptrs[j] is not None:
            if which == j:
                total = tl.zeros([BLOCK], tl.float32)
                count = tl.zeros([BLOCK], tl.float32)
                for start in range(0, S, BLOCK):
                    s = start + tl.arange(0, BLOCK)
                    real = s < S
                    if IS_MASKED[j]:
                        mask = tl.load(mask_ptr + sentence * S + s, mask=real, other=0)
                        real &= mask != 0
                    total += vector(row_gate_ptr + (j * B + sentence) * S, s, real)
                    count += real.to(tl.float32)
                pooled = tl.sum(total, axis=0) / tl.maximum(tl.sum(count, axis=0), 1.0)
                tl.store(value_ptrs[j] + sentence, pooled)


@triton.jit(do_not_specialize=["N", "S", "tiles"])
def _lora_linear_expand_kernel(
    y_ptr, s_ptr, b_ptrs, b_index_ptrs, gate_ptrs, scales,
    N, S, tiles,
    DOUT: tl.constexpr, FIRST: tl.constexpr, CHUNKS: tl.constexpr,
    BEGINS: tl.constexpr, RANKS: tl.constexpr, OFFSETS: tl.constexpr, SIZES: tl.constexpr,
    B_PER_SAMPLE: tl.constexpr, GATE_PER_ROW: tl.constexpr, W: tl.constexpr,
    IS_APART: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One tile of y, of the CHUNKS tiles of columns from FIRST on: y += (scale · g · s) Bᵀ."""
    pid = tl.program_id(0)
    cols = FIRST + (pid % CHUNKS) * BLOCK_D + tl.arange(0, BLOCK_D)
    tile = pid // CHUNKS
    group = tile // tiles
    first = (tile % tiles) * BLOCK_T
    col_ok = reached(cols, OFFSETS, SIZES)
    if has_any(col_ok):
        rows = tl.arange(0, BLOCK_T)
        row_ok = rows < N - first
        t0 = group.to(tl.int64) * N + first
        slots = tl.arange(0, BLOCK_W)
        dtype = y_ptr.dtype.element_ty
        y_at = y_ptr + t0 * DOUT + rows[:, None] * DOUT + cols[None, :]
        ok = row_ok[:, None] & col_ok[None, :]
        y = tl.load(y_at, mask=ok, other=0.0)
        s_ok = row_ok[:, None] & (slots < W)[None, :]
        s = tl.load(s_ptr + t0 * W + rows[:, None] * W + slots[None, :], mask=s_ok, other=0.0)
        b = packed_b(
            b_ptrs, b_index_ptrs, group, slots[:, None], cols[None, :], s_ptr,
            BEGINS, RANKS, OFFSETS, SIZES, B_PER_SAMPLE,
        )  # fmt: skip
        factors = slot_factors(
            gate_ptrs, scales, t0 + rows, row_ok, slots, S,
            BEGINS, RANKS, GATE_PER_ROW, BLOCK_T, BLOCK_W,
        )  # fmt: skip
        s = (s.to(tl.float32) * factors).to(dtype)
        delta = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        if IS_APART:
            for i in tl.static_range(len(RANKS)):
                own_cols = of_branch(cols, OFFSETS[i], SIZES[i])
                if has_any(own_cols):
                    own_slots = of_branch(slots, BEGINS[i], RANKS[i])
                    own_b = alone(b, own_slots[:, None])
                    part = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
                    part = product(alone(s, own_slots[None, :]), own_b, part)
                    delta += tl.where(own_cols[None, :], part, 0.0)
        else:
            delta = product(s, b, delta)
        tl.store(y_at, (y.to(tl.float32) + delta).to(dtype), mask=ok)
