# ruff: noqa: N803  (compile-time constants and the contract's letters are upper case)
"""The forward kernels of symmetric_kl in Triton.

    loss = mean over rows of 0.5 [KL(p2 ‖ p1) + KL(p1 ‖ p2)],  p = softmax(z)

The two divergences add up to Σ (p1 - p2) (log p1 - log p2), and because both p sum to 1 the
log-sum-exps drop out of it: Σ (p1 - p2) d with d = z1 - z2, or d less any constant. So one pass
over the vocabulary does: with the maximum m so far, l = Σ exp(z - m) and t = Σ exp(z - m) d for
both, rescaled where m grows, and in the end t1 / l1 - t2 / l2. The constant ("shift") is the mean
of d under p1 so far: without it the quotients could be much larger than their difference.

"fwd": a program owns BLOCK_T rows and streams their columns. "mean": one program adds up the rows'
values, so that their order is fixed. A logit of -inf is a class that does not exist: its
probability is 0, and so is its term; where the other side has it, that side's term is infinite.
Rows that do not count are not read. Everything is float32 inside.
"""

import triton
import triton.language as tl


@triton.jit
def _finite(x):
    """x where it is a number, else 0."""
    return tl.where(x - x == 0.0, x, 0.0)


@triton.jit
def _scaled(m, larger):
    """The factor of sums whose maximum grows from m to ``larger``, which may both be -inf."""
    return tl.where(m == larger, 1.0, tl.exp(m - larger))


@triton.jit
def _term(e, d):
    """e d, where 0 is what a class without weight adds to a sum."""
    return tl.where(e == 0.0, 0.0, e * d)


@triton.jit
def _weights(z, m, ok):
    """exp(z - m); a row that has only -inf so far has no difference from m that is a number."""
    base = tl.where(m == float("-inf"), 0.0, m)
    return tl.where(ok, tl.exp(z - base[:, None]), 0.0)


@triton.jit(do_not_specialize=["T"])
def _symmetric_kl_fwd_kernel(
    z1_ptr, z2_ptr, mask_ptr, value_ptr, lse_ptr, T, C,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Each row's value [T], and the log-sum-exps [2, T]; 0 where a row does not count."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_read = rows < T
    if mask_ptr is not None:
        is_read = tl.load(mask_ptr + rows, mask=is_read, other=0) != 0
    low = tl.full([BLOCK_T], float("-inf"), tl.float32)
    none = tl.zeros([BLOCK_T], tl.float32)
    m1, l1, t1, m2, l2, t2, shift = low, none, none, low, none, none, none
    for start in range(0, C, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        ok = is_read[:, None] & (cols < C)[None, :]
        at = rows[:, None] * C + cols[None, :]
        z1 = tl.load(z1_ptr + at, mask=ok, other=float("-inf")).to(tl.float32)
        z2 = tl.load(z2_ptr + at, mask=ok, other=float("-inf")).to(tl.float32)
        larger1, larger2 = tl.maximum(m1, tl.max(z1, axis=1)), tl.maximum(m2, tl.max(z2, axis=1))
        f1, f2 = _scaled(m1, larger1), _scaled(m2, larger2)
        m1, l1, t1 = larger1, l1 * f1, _term(f1, t1)
        m2, l2, t2 = larger2, l2 * f2, _term(f2, t2)
        e1, e2 = _weights(z1, m1, ok), _weights(z2, m2, ok)
        # Two classes that do not exist have no difference.
        d = tl.where(z1 == z2, 0.0, z1 - z2)
        d = tl.where(ok, d - shift[:, None], 0.0)
        # The block's sums are taken around its own mean, and then moved to that of all columns.
        s1, s2 = tl.sum(e1, axis=1), tl.sum(e2, axis=1)
        mean = _finite(tl.sum(_term(e1, d), axis=1) / s1)
        d = tl.where(ok, d - mean[:, None], 0.0)
        step = _finite(mean * (s1 / (l1 + s1)))
        t1 = (t1 - step * l1) + (tl.sum(_term(e1, d), axis=1) + (mean - step) * s1)
        t2 = (t2 - step * l2) + (tl.sum(_term(e2, d), axis=1) + (mean - step) * s2)
        l1, l2, shift = l1 + s1, l2 + s2, shift + step
    value = t1 / l1 - t2 / l2
    # Never negative but by rounding; a NaN stays one.
    value = tl.where(is_read, tl.where(value < 0.0, 0.0, 0.5 * value), 0.0)
    tl.store(value_ptr + rows, value, mask=rows < T)
    tl.store(lse_ptr + rows, tl.where(is_read, m1 + tl.log(l1), 0.0), mask=rows < T)
    tl.store(lse_ptr + T + rows, tl.where(is_read, m2 + tl.log(l2), 0.0), mask=rows < T)


@triton.jit(do_not_specialize=["T"])
def _symmetric_kl_mean_kernel(value_ptr, mask_ptr, loss_ptr, count_ptr, T, BLOCK: tl.constexpr):
    """The loss [] and how many rows count []; 1 where none does, so that an empty mean is 0.

    Without the rows' values only the count.
    """
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.float32)
    for start in range(0, T, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        if value_ptr is not None:
            total += tl.load(value_ptr + rows, mask=rows < T, other=0.0)
        if mask_ptr is not None:
            count += (tl.load(mask_ptr + rows, mask=rows < T, other=0) != 0).to(tl.float32)
        else:
            count += (rows < T).to(tl.float32)
    rows_that_count = tl.maximum(tl.sum(count, axis=0), 1.0)
    if value_ptr is not None:
        tl.store(loss_ptr, tl.sum(total, axis=0) / rows_that_count)
    tl.store(count_ptr, rows_that_count)
