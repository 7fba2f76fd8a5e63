# ruff: noqa: N803  (compile-time constants and the contract's letters are upper case)
"""The forward kernels of masked_weight in Triton.

    W = w0 + beta u v;  s = |W| + alpha1 a b + alpha2 (row 1ᵀ + 1 colᵀ);  y = W at the ``keep``
    highest s, else 0

The threshold is found by its bits: a score becomes an unsigned key of the same order, whose three
digits (11, 11 and 10 bits) are counted one after the other. "score": a tile's y = W, keys, and the
counts of the first digit. "count": those of the second and of the third digit, over all keys; each
program reads the counts so far and finds the digits before for itself. "equal": how many keys of
each block are the threshold. "write": mask, and y = 0 where it is 0; of the keys equal to the
threshold those of the lowest flat index stay.

Counts are integers, so their order does not matter: two runs give the same bits. Scores are float32
and are made once. NaN counts as infinity.
"""

import triton
import triton.language as tl

from .._triton import product

BINS = tl.constexpr(2048)


@triton.jit
def left_factor(ptr, rows, Dout, RANK: tl.constexpr, BLOCK_R: tl.constexpr):
    """u or a at ``rows``, [rows, BLOCK_R] float32; 0 past the last rank and the last row."""
    ranks = tl.arange(0, BLOCK_R)
    ok = (rows < Dout)[:, None] & (ranks < RANK)[None, :]
    at = rows.to(tl.int64)[:, None] * RANK + ranks[None, :]
    return tl.load(ptr + at, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def right_factor(ptr, cols, Din, RANK: tl.constexpr, BLOCK_R: tl.constexpr):
    """v or b at ``cols``, [BLOCK_R, cols] float32; 0 past the last rank and the last column."""
    ranks = tl.arange(0, BLOCK_R)
    ok = (ranks < RANK)[:, None] & (cols < Din)[None, :]
    at = ranks.to(tl.int64)[:, None] * Din + cols[None, :]
    return tl.load(ptr + at, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def updated(w0_ptr, u, v, rows, cols, ok, Din, beta):
    """W = w0 + beta u v of a tile."""
    at = rows.to(tl.int64)[:, None] * Din + cols[None, :]
    w0 = tl.load(w0_ptr + at, mask=ok, other=0.0).to(tl.float32)
    return w0 + beta * product(u, v, tl.zeros(w0.shape, tl.float32))


@triton.jit
def _key_of(score):
    """The order of scores as an order of unsigned integers."""
    score = tl.where(score == score, score, float("inf"))
    bits = score.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, ~bits, bits | 0x80000000)


@triton.jit
def _add_counts(counts_ptr, digits, ok):
    found = tl.histogram(digits.to(tl.int32), BINS, mask=ok)
    tl.atomic_add(counts_ptr + tl.arange(0, BINS), found, mask=found > 0, sem="relaxed")


@triton.jit
def _find(counts_ptr, keep, DIGITS: tl.constexpr):
    """The threshold's first DIGITS digits; of the keys that have them, how many stay, and how many
    there are.
    """
    bins = tl.arange(0, BINS)
    prefix = tl.full([], 0, tl.uint32)
    stay, equal = keep, keep
    for i in tl.static_range(DIGITS):
        counts = tl.load(counts_ptr + i * BINS + bins)
        # Keys of at least each digit; the last digit with `stay` of them is the threshold's.
        from_here = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0) + counts
        digit = tl.sum((from_here >= stay).to(tl.int32), axis=0) - 1
        equal = tl.sum(tl.where(bins == digit, counts, 0), axis=0)
        stay = stay - tl.sum(tl.where(bins == digit, from_here, 0), axis=0) + equal
        if i == 2:
            # The last digit has 10 bits. Above every key, where none stays, it has 11.
            prefix = (prefix << 10) | tl.minimum(digit, 1023).to(tl.uint32)
        else:
            prefix = (prefix << 11) | digit.to(tl.uint32)
    return prefix, stay, equal


@triton.jit(do_not_specialize=["Dout"])
def _masked_weight_score_kernel(
    w0_ptr, u_ptr, v_ptr, a_ptr, b_ptr, row_ptr, col_ptr, y_ptr, key_ptr, counts_ptr,
    Dout, Din, beta, alpha1, alpha2,
    R: tl.constexpr, R2: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_R2: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile: y = W, keys [Dout, Din] as int32, and the counts [BINS] of the first digit."""
    across = tl.cdiv(Din, BLOCK_D)
    pid = tl.program_id(0)
    rows = pid // across * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = pid % across * BLOCK_D + tl.arange(0, BLOCK_D)
    ok = (rows < Dout)[:, None] & (cols < Din)[None, :]
    u = left_factor(u_ptr, rows, Dout, R, BLOCK_R)
    w = updated(w0_ptr, u, right_factor(v_ptr, cols, Din, R, BLOCK_R), rows, cols, ok, Din, beta)
    a, b = (
        left_factor(a_ptr, rows, Dout, R2, BLOCK_R2),
        right_factor(b_ptr, cols, Din, R2, BLOCK_R2),
    )
    row = tl.load(row_ptr + rows, mask=rows < Dout, other=0.0).to(tl.float32)
    col = tl.load(col_ptr + cols, mask=cols < Din, other=0.0).to(tl.float32)
    score = tl.abs(w) + alpha1 * product(a, b, tl.zeros(w.shape, tl.float32))
    key = _key_of(score + alpha2 * (row[:, None] + col[None, :]))
    at = rows.to(tl.int64)[:, None] * Din + cols[None, :]
    tl.store(y_ptr + at, w.to(y_ptr.dtype.element_ty), mask=ok)
    tl.store(key_ptr + at, key.to(tl.int32, bitcast=True), mask=ok)
    size: tl.constexpr = BLOCK_T * BLOCK_D
    _add_counts(counts_ptr, tl.reshape(key >> 21, [size]), tl.reshape(ok, [size]))


@triton.jit(do_not_specialize=["entries", "keep"])
def _masked_weight_count_kernel(
    key_ptr, counts_ptr, entries, keep, DIGIT: tl.constexpr, BLOCK: tl.constexpr
):
    """The counts of a further digit, of the keys that share those before."""
    prefix, _, _ = _find(counts_ptr, keep, DIGIT)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(key_ptr + at, mask=at < entries, other=0).to(tl.uint32, bitcast=True)
    if DIGIT == 1:
        shared, digit = key >> 21, (key >> 10) & 2047
    else:
        shared, digit = key >> 10, key & 1023
    _add_counts(counts_ptr + DIGIT * BINS, digit, (at < entries) & (shared == prefix))


@triton.jit(do_not_specialize=["entries", "keep"])
def _masked_weight_equal_kernel(key_ptr, counts_ptr, equal_ptr, entries, keep, BLOCK: tl.constexpr):
    """How many keys of each block are equal to the threshold."""
    threshold, _, _ = _find(counts_ptr, keep, 3)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(key_ptr + at, mask=at < entries, other=0).to(tl.uint32, bitcast=True)
    is_equal = (at < entries) & (key == threshold)
    tl.store(equal_ptr + tl.program_id(0), tl.sum(is_equal.to(tl.int32), axis=0))


@triton.jit(do_not_specialize=["entries", "keep"])
def _masked_weight_write_kernel(
    key_ptr, counts_ptr, equal_ptr, y_ptr, mask_ptr, entries, keep, BLOCK: tl.constexpr
):
    """mask, and y where it is 0."""
    threshold, stay, equal = _find(counts_ptr, keep, 3)
    pid = tl.program_id(0)
    before = tl.full([], 0, tl.int32)
    if stay < equal:
        for start in range(0, pid, BLOCK):
            blocks = start + tl.arange(0, BLOCK)
            before += tl.sum(tl.load(equal_ptr + blocks, mask=blocks < pid, other=0), axis=0)
    at = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < entries
    key = tl.load(key_ptr + at, mask=ok, other=0).to(tl.uint32, bitcast=True)
    is_equal = ok & (key == threshold)
    ordinal = before + tl.cumsum(is_equal.to(tl.int32), axis=0)
    stays = (key > threshold) | (is_equal & (ordinal <= stay))
    tl.store(mask_ptr + at, stays, mask=ok)
    zero = tl.zeros([BLOCK], y_ptr.dtype.element_ty)
    tl.store(y_ptr + at, zero, mask=ok & (stays == 0))
