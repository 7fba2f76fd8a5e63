# ruff: noqa: N803  (compile-time constants and the contract's letters are upper case)
"""The backward kernel of symmetric_kl in Triton: dz1 = -dz2 = 0.5 dloss (p1 - p2) / count.

A program owns a tile of the gradients. Rows that do not count are not read. The target of each
divergence is a constant for the gradient, which is therefore not the derivative of the loss.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T"])
def _symmetric_kl_bwd_kernel(
    z1_ptr, z2_ptr, mask_ptr, lse_ptr, dloss_ptr, count_ptr, dz1_ptr, dz2_ptr, T, C,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of dz1 and dz2 [T, C]; None: not wanted."""
    chunks = tl.cdiv(C, BLOCK_D)
    pid = tl.program_id(0)
    rows = (pid // chunks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    cols = pid % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (rows < T)[:, None] & (cols < C)[None, :]
    is_read = rows < T
    if mask_ptr is not None:
        is_read = tl.load(mask_ptr + rows, mask=is_read, other=0) != 0
    ok = inside & is_read[:, None]
    at = rows[:, None] * C + cols[None, :]
    z1 = tl.load(z1_ptr + at, mask=ok, other=0.0).to(tl.float32)
    z2 = tl.load(z2_ptr + at, mask=ok, other=0.0).to(tl.float32)
    lse1 = tl.load(lse_ptr + rows, mask=is_read, other=0.0)
    lse2 = tl.load(lse_ptr + T + rows, mask=is_read, other=0.0)
    factor = 0.5 * tl.load(dloss_ptr) / tl.load(count_ptr)
    difference = tl.exp(z1 - lse1[:, None]) - tl.exp(z2 - lse2[:, None])
    difference = tl.where(ok, factor * difference, 0.0)
    if dz1_ptr is not None:
        tl.store(dz1_ptr + at, difference.to(dz1_ptr.dtype.element_ty), mask=inside)
    if dz2_ptr is not None:
        tl.store(dz2_ptr + at, (-difference).to(dz2_ptr.dtype.element_ty), mask=inside)
