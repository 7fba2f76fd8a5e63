# ruff: noqa: N803  (compile-time constants and the contract's letters are upper case)
"""Device functions that Triton kernels share: Philox dropout, activations, LayerNorm statistics,
banks, matrix products and sums of parts.

Importing this file imports Triton; only a backend's `triton.py` does so, and only once it serves a
call.
"""

import triton
import triton.language as tl
from triton import OutOfResources
from triton.runtime.jit import JITFunction

__all__ = ["OutOfResources"]  # so that a backend's host side need not import Triton

# The interpreter keeps bfloat16 as bare 16-bit integers and cannot multiply them as matrices.
IS_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def is_interpreted() -> bool:
    """Do both our functions and Triton's own run in the interpreter? Each decides when it is
    imported.
    """
    return not isinstance(product, JITFunction) and not isinstance(tl.interleave, JITFunction)


@triton.jit
def product(a, b, accumulated):
    """accumulated + a b in float32. A float32 product is IEEE float32, not TF32: closeness is
    judged against eager.
    """
    if IS_INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulated, input_precision="ieee")


@triton.jit
def philox_round(c0, c1, c2, c3, k0, k1):
    """One round of Philox4x32 on uint32 words."""
    high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
    high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
    return high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0


@triton.jit
def keep_mask(rows, start, seed_low, seed_high, threshold, D, BLOCK_D: tl.constexpr):
    """[rows, BLOCK_D] bool: what dropout keeps of the columns start ... start + BLOCK_D.

    The words of ``_philox.py``: element (row, column) is word ``column % 4`` of the counter ``row *
    ceil(D / 4) + column // 4``. One counter serves four neighbours, so the four words are computed
    once and interleaved.
    """
    groups = start // 4 + tl.arange(0, BLOCK_D // 4)
    counter = rows.to(tl.int64)[:, None] * ((D + 3) // 4) + groups[None, :]
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    c2, c3 = tl.zeros_like(c0), tl.zeros_like(c0)
    k0, k1 = seed_low.to(tl.uint32, bitcast=True), seed_high.to(tl.uint32, bitcast=True)
    for _ in tl.static_range(10):
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, k0, k1)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    words = tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))
    return words >= threshold.to(tl.uint32, bitcast=True)


@triton.jit
def tanh(h):
    """tanh without a library call. Near 0 the quotient would lose every digit, so the series takes
    over where its error is below float32's.
    """
    square = h * h
    series = 2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835))
    series = h + h * square * (-1.0 / 3 + square * series)
    size = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(h)) + 1.0)
    return tl.where(tl.abs(h) < 0.125, series, tl.where(h < 0, -size, size))


@triton.jit
def activate(h, ACTIVATION: tl.constexpr):
    """φ(h) in float32. φ(0) = 0 for every φ, so padded columns of h stay zero."""
    if ACTIVATION == "relu":
        h = tl.where(h < 0, 0.0, h)  # a NaN stays one
    elif ACTIVATION == "gelu":
        h = 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        h = 0.5 * h * (1.0 + tanh(0.7978845608028654 * (h + 0.044715 * h * h * h)))
    elif ACTIVATION == "silu":
        h = h * tl.sigmoid(h)
    elif ACTIVATION == "tanh":
        h = tanh(h)
    return h


@triton.jit
def activation_slope(h, ACTIVATION: tl.constexpr):
    """φ'(h) in float32, of a smooth φ."""
    slope = tl.full(h.shape, 1.0, tl.float32)
    if ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * h * h)
        slope = 0.5 * (1.0 + tl.erf(h * 0.7071067811865476)) + h * density
    elif ACTIVATION == "gelu_tanh":
        t = tanh(0.7978845608028654 * (h + 0.044715 * h * h * h))
        inner = 0.7978845608028654 * (1.0 + 3 * 0.044715 * h * h)
        slope = 0.5 * (1.0 + t) + 0.5 * h * (1.0 - t * t) * inner
    elif ACTIVATION == "silu":
        s = tl.sigmoid(h)
        slope = s * (1.0 + h * (1.0 - s))
    elif ACTIVATION == "tanh":
        t = tanh(h)
        slope = 1.0 - t * t
    return slope


@triton.jit
def through_activation(da, h, ACTIVATION: tl.constexpr):
    """da φ'(h) in float32. Where relu has no slope it lets nothing through, not even a NaN."""
    if ACTIVATION == "relu":
        found = tl.where(h <= 0, 0.0, da)
    else:
        found = da * activation_slope(h, ACTIVATION)
    return found


@triton.jit
def merge_moments(mean, m2, chunk, col_ok, before):
    """Mean and sum of squared deviations of ``before`` columns, joined with those of a chunk.

    Chan's formula: a difference of two sums of squares would lose the variance of rows far from
    zero.
    """
    count = tl.sum(col_ok.to(tl.float32), axis=0)
    chunk_mean = tl.sum(tl.where(col_ok[None, :], chunk, 0.0), axis=1) / count
    off = tl.where(col_ok[None, :], chunk - chunk_mean[:, None], 0.0)
    delta = chunk_mean - mean
    total = before + count
    m2 = m2 + tl.sum(off * off, axis=1) + delta * delta * (before * count / total)
    return mean + delta * (count / total), m2


@triton.jit
def row_norm(
    x_ptr, rows, row_ok, eps, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Mean and 1 / standard deviation of rows of x [BLOCK_T, D]; x_ptr is the tile's first row."""
    mean = tl.zeros([BLOCK_T], tl.float32)
    m2 = tl.zeros([BLOCK_T], tl.float32)
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        ok = row_ok[:, None] & (cols < D)[None, :]
        x = tl.load(x_ptr + rows[:, None] * D + cols[None, :], mask=ok, other=0.0).to(tl.float32)
        mean, m2 = merge_moments(mean, m2, x, cols < D, start)
    return mean, tl.rsqrt(m2 / D + eps)


@triton.jit
def vector(ptr, at, ok):
    """Elements of a parameter vector in float32, 0 where ``ok`` is False."""
    return tl.load(ptr + at, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def member(index_ptr, group, IS_PER_SAMPLE: tl.constexpr):
    """Which member of a bank a group of rows uses; 0 without an index."""
    found = tl.full([], 0, tl.int64)
    if index_ptr is not None:
        found = tl.load(index_ptr + group) if IS_PER_SAMPLE else tl.load(index_ptr)
    return found


@triton.jit
def sum_parts(
    out_ptr, part_ptr, index_ptr, members, block, groups, shares,
    AT: tl.constexpr, SIZE: tl.constexpr, IS_PER_SAMPLE: tl.constexpr, PART_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums one gradient over all parts, or for a bank over the groups that picked a member, if
    ``block`` is one of its blocks. Returns the block's number counted from the next gradient.
    """
    blocks: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    if block >= 0 and block < blocks * members:
        which = block // blocks
        at = (block % blocks) * BLOCK + tl.arange(0, BLOCK)
        ok = at < SIZE
        total = tl.zeros([BLOCK], tl.float32)
        for group in range(groups):
            if member(index_ptr, group, IS_PER_SAMPLE) == which:
                for share in range(shares):
                    part = (group * shares + share).to(tl.int64)
                    total += vector(part_ptr + part * PART_SIZE + AT, at, ok)
        out_at = which.to(tl.int64) * SIZE + at
        tl.store(out_ptr + out_at, total.to(out_ptr.dtype.element_ty), mask=ok)
    return block - blocks * members


@triton.jit(do_not_specialize=["groups", "shares_in", "shares_out"])
def sum_kernel(
    part_in_ptr, part_out_ptr, out_ptrs, index_ptrs, groups, shares_in, shares_out,
    IS_OUT: tl.constexpr, AT: tl.constexpr, SIZE: tl.constexpr, MEMBERS: tl.constexpr,
    IS_PER_SAMPLE: tl.constexpr, SIZE_IN: tl.constexpr, SIZE_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of one of several gradients: the sum of its parts, in their order, out of the
    one buffer of parts or the other.
    """
    block = tl.program_id(0)
    for i in tl.static_range(len(AT)):
        if IS_OUT[i]:
            block = sum_parts(
                out_ptrs[i], part_out_ptr, index_ptrs[i], MEMBERS[i], block, groups, shares_out,
                AT[i], SIZE[i], IS_PER_SAMPLE[i], SIZE_OUT, BLOCK,
            )  # fmt: skip
        else:
            block = sum_parts(
                out_ptrs[i], part_in_ptr, index_ptrs[i], MEMBERS[i], block, groups, shares_in,
                AT[i], SIZE[i], IS_PER_SAMPLE[i], SIZE_IN, BLOCK,
            )  # fmt: skip
