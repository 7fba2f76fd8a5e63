# ruff: noqa: N803  (compile-time constants and the contract's letters are upper case)
"""The backward kernels of masked_weight in Triton. With G = dy:

    dW = G (mask + |W|),  dscore = G W
    dw0 = dW;  du = beta dW vᵀ;  dv = beta uᵀ dW
    da = alpha1 dscore bᵀ;  db = alpha1 aᵀ dscore;  drow, dcol = alpha2 sums of dscore

"rows": a program owns BLOCK_T rows and a share of the column tiles, and with them a part of du, da
and drow. "columns": a program owns BLOCK_D columns and a share of the row tiles: a part of dv, db
and dcol. Each makes W again from the factors; nothing the size of the matrix is kept. "sum" adds up
the shares in order, so two runs give the same bits. Everything is float32 inside.
"""

import triton
import triton.language as tl

from .._triton import product
from ._triton_fwd import left_factor, right_factor, updated


@triton.jit
def _derive(w0_ptr, dy_ptr, mask_ptr, u, v, rows, cols, ok, Din, beta):
    """dW and dscore of a tile; 0 outside of the matrix."""
    w = updated(w0_ptr, u, v, rows, cols, ok, Din, beta)
    at = rows.to(tl.int64)[:, None] * Din + cols[None, :]
    g = tl.load(dy_ptr + at, mask=ok, other=0.0).to(tl.float32)
    kept = (tl.load(mask_ptr + at, mask=ok, other=0) != 0).to(tl.float32)
    return tl.where(ok, g * (kept + tl.abs(w)), 0.0), tl.where(ok, g * w, 0.0)


@triton.jit
def _store_left(ptr, sums, rows, Dout, RANK: tl.constexpr, BLOCK_R: tl.constexpr):
    ranks = tl.arange(0, BLOCK_R)
    ok = (rows < Dout)[:, None] & (ranks < RANK)[None, :]
    tl.store(ptr + rows.to(tl.int64)[:, None] * RANK + ranks[None, :], sums, mask=ok)


@triton.jit
def _store_right(ptr, sums, cols, Din, RANK: tl.constexpr, BLOCK_R: tl.constexpr):
    ranks = tl.arange(0, BLOCK_R)
    ok = (ranks < RANK)[:, None] & (cols < Din)[None, :]
    tl.store(ptr + ranks.to(tl.int64)[:, None] * Din + cols[None, :], sums, mask=ok)


@triton.jit(do_not_specialize=["Dout", "shares"])
def _masked_weight_bwd_rows_kernel(
    w0_ptr, u_ptr, v_ptr, b_ptr, dy_ptr, mask_ptr, dw0_ptr, part_ptr,
    Dout, Din, shares, beta,
    R: tl.constexpr, R2: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_R2: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A share's part of du | da | drow, in part_ptr [shares, Dout (R + R2 + 1)]; dw0 or None."""
    share = tl.program_id(0) % shares
    rows = tl.program_id(0) // shares * BLOCK_T + tl.arange(0, BLOCK_T)
    u = left_factor(u_ptr, rows, Dout, R, BLOCK_R)
    du = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
    da = tl.zeros([BLOCK_T, BLOCK_R2], tl.float32)
    drow = tl.zeros([BLOCK_T], tl.float32)
    for tile in range(share, tl.cdiv(Din, BLOCK_D), shares):
        cols = tile * BLOCK_D + tl.arange(0, BLOCK_D)
        ok = (rows < Dout)[:, None] & (cols < Din)[None, :]
        v = right_factor(v_ptr, cols, Din, R, BLOCK_R)
        dw, ds = _derive(w0_ptr, dy_ptr, mask_ptr, u, v, rows, cols, ok, Din, beta)
        if dw0_ptr is not None:
            at = rows.to(tl.int64)[:, None] * Din + cols[None, :]
            tl.store(dw0_ptr + at, dw.to(dw0_ptr.dtype.element_ty), mask=ok)
        du = product(dw, tl.trans(v), du)
        da = product(ds, tl.trans(right_factor(b_ptr, cols, Din, R2, BLOCK_R2)), da)
        drow += tl.sum(ds, axis=1)
    rows_total = Dout.to(tl.int64)
    part_ptr += share * rows_total * (R + R2 + 1)
    _store_left(part_ptr, du, rows, Dout, R, BLOCK_R)
    _store_left(part_ptr + rows_total * R, da, rows, Dout, R2, BLOCK_R2)
    tl.store(part_ptr + rows_total * (R + R2) + rows, drow, mask=rows < Dout)


@triton.jit(do_not_specialize=["Dout", "shares"])
def _masked_weight_bwd_columns_kernel(
    w0_ptr, u_ptr, v_ptr, a_ptr, dy_ptr, mask_ptr, part_ptr,
    Dout, Din, shares, beta,
    R: tl.constexpr, R2: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_R2: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A share's part of dv | db | dcol, in part_ptr [shares, (R + R2 + 1) Din]."""
    share = tl.program_id(0) % shares
    cols = tl.program_id(0) // shares * BLOCK_D + tl.arange(0, BLOCK_D)
    v = right_factor(v_ptr, cols, Din, R, BLOCK_R)
    dv = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    db = tl.zeros([BLOCK_R2, BLOCK_D], tl.float32)
    dcol = tl.zeros([BLOCK_D], tl.float32)
    for tile in range(share, tl.cdiv(Dout, BLOCK_T), shares):
        rows = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        ok = (rows < Dout)[:, None] & (cols < Din)[None, :]
        u = left_factor(u_ptr, rows, Dout, R, BLOCK_R)
        dw, ds = _derive(w0_ptr, dy_ptr, mask_ptr, u, v, rows, cols, ok, Din, beta)
        dv = product(tl.trans(u), dw, dv)
        db = product(tl.trans(left_factor(a_ptr, rows, Dout, R2, BLOCK_R2)), ds, db)
        dcol += tl.sum(ds, axis=0)
    part_ptr += share.to(tl.int64) * (R + R2 + 1) * Din
    _store_right(part_ptr, dv, cols, Din, R, BLOCK_R)
    _store_right(part_ptr + R * Din, db, cols, Din, R2, BLOCK_R2)
    tl.store(part_ptr + (R + R2) * Din + cols, dcol, mask=cols < Din)


@triton.jit
def _masked_weight_bwd_sum_kernel(
    row_part_ptr, column_part_ptr, out_ptrs, factors,
    IS_COLUMN: tl.constexpr, STARTS: tl.constexpr, SIZES: tl.constexpr,
    ROW_SHARES: tl.constexpr, ROW_SIZE: tl.constexpr,
    COLUMN_SHARES: tl.constexpr, COLUMN_SIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Output i, SIZES[i] elements that begin at STARTS[i] in each share; the blocks of the outputs
    that are there follow each other.
    """
    pid = tl.program_id(0)
    first = 0
    for i in tl.static_range(len(SIZES)):
        if out_ptrs[i] is not None:
            blocks = (SIZES[i] + BLOCK - 1) // BLOCK
            if (pid >= first) & (pid < first + blocks):
                at = (pid - first).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
                ok = at < SIZES[i]
                total = tl.zeros([BLOCK], tl.float32)
                if IS_COLUMN[i]:
                    from_ptr = column_part_ptr + STARTS[i] + at
                    for _ in range(COLUMN_SHARES):
                        total += tl.load(from_ptr, mask=ok, other=0.0)
                        from_ptr += COLUMN_SIZE
                else:
                    from_ptr = row_part_ptr + STARTS[i] + at
                    for _ in range(ROW_SHARES):
                        total += tl.load(from_ptr, mask=ok, other=0.0)
                        from_ptr += ROW_SIZE
                total *= factors[i]
                tl.store(out_ptrs[i] + at, total.to(out_ptrs[i].dtype.element_ty), mask=ok)
            first += blocks
