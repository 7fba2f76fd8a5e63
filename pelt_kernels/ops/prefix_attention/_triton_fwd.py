# ruff: noqa: N803  (compile-time constants and the contract's letters are upper case)
"""The forward kernel of prefix_attention in Triton, and what backward shares with it.

    out = softmax( [ g · scale · (Q Pkᵀ) ; scale · (Q Kᵀ) + bias + mask ] ) [ g · Pv ; V ]

A program owns BLOCK_S queries of one head and streams the columns with an online softmax: first the
prefix, in narrow tiles of BLOCK_P gathered from all segments where they lie (shared, or a sample's
row of a table), then K and V in tiles of BLOCK_N. The gate multiplies scores and probabilities of
prefix columns, so neither a gated nor an expanded prefix is ever written.

Tiles of keys that every query of the program sees skip all comparisons; tiles that none sees are
not visited. Dropout's words come in groups of four columns of [prefix ; keys]: with dropout the
first tile of keys starts up to three columns early, so that no group is cut.

Scores are float32, times UNIT: 16-bit calls have them in base 2, which the hardware's exponential
takes as it is; float32 ones keep the unit in which backward reads the log-sum-exp, since a change
of base rounds. A row that sees nothing keeps its maximum at -inf; 0 is subtracted there instead,
since -inf - (-inf) is NaN. Probabilities are rounded to the activation's dtype for their product
with V.
"""

import triton
import triton.language as tl

from .._triton import keep_mask, member, product

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exponential(x, like):
    """exp(x), or for 16-bit activations ``like`` just the hardware's exp2 of a rounded product.

    That product's rounding grows with x, which float32 results would show: there n ln 2 is taken
    off first, in two parts of which the larger has few enough bits to be exact.
    """
    if like.dtype == tl.float32:
        x = tl.where(x < -150.0, -150.0, x)  # 0 all the same, and -inf would give NaN
        n = tl.floor(x * LOG2E + 0.5)
        rest = (x - n * 0.693359375) + n * 2.12194440e-4
        found = tl.exp2(n) * tl.exp2(rest * LOG2E)
    else:
        found = tl.exp2(x * LOG2E)
    return found


@triton.jit
def row_tile(
    ptr, start, stride, limit,
    E: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Rows start ... start + BLOCK of a head, [BLOCK, BLOCK_E]; 0 outside of [0, limit), which only
    a tile with CHECK can reach.
    """
    r, e = tl.arange(0, BLOCK), tl.arange(0, BLOCK_E)
    at = ptr + (tl.full([], 0, tl.int64) + start) * stride + r[:, None] * stride + e[None, :]
    if CHECK or BLOCK_E != E:
        row_ok = (start + r >= 0) & (start + r < limit)
        found = tl.load(at, mask=row_ok[:, None] & (e < E)[None, :], other=0.0)
    else:
        found = tl.load(at)
    return found


@triton.jit
def without_hidden(rows, j, mask_ptr, length, N, CHECK: tl.constexpr):
    """Keys or values ``rows`` [BLOCK, BLOCK_E], with zeros for those j that the sample's mask or
    length hides, which only a tile with CHECK has: a probability of 0 times a NaN would be one.
    """
    if CHECK:
        seen = (j >= 0) & (j < length)
        if mask_ptr is not None:
            seen = seen & (tl.load(mask_ptr + j, mask=(j >= 0) & (j < N), other=0) != 0)
        rows = tl.where(seen[:, None], rows, tl.zeros_like(rows))
    return rows


@triton.jit
def prefix_tile(
    ptrs, index_ptrs, b, g, cols, like_ptr,
    G: tl.constexpr, E: tl.constexpr, BEGINS: tl.constexpr, LENGTHS: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Rows ``cols`` of all segments in order, for sample b and key-value head g, [BLOCK_P,
    BLOCK_E]; 0 after the last.
    """
    e = tl.arange(0, BLOCK_E)
    found = tl.zeros([BLOCK_P, BLOCK_E], like_ptr.dtype.element_ty)
    for i in tl.static_range(len(LENGTHS)):
        row = cols - BEGINS[i]
        ok = ((row >= 0) & (row < LENGTHS[i]))[:, None] & (e < E)[None, :]
        ptr = ptrs[i] + member(index_ptrs[i], b, True) * (LENGTHS[i] * G * E) + g * E
        loaded = tl.load(ptr + row[:, None] * (G * E) + e[None, :], mask=ok, other=0.0)
        found = tl.where(ok, loaded.to(found.dtype), found)
    return found


@triton.jit
def own_scores(
    dots, i, j, mask_ptr, bias_ptr, bias_stride, S, N, length, scale,
    IS_CAUSAL: tl.constexpr, CHECK: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Scores, times UNIT, of the products ``dots`` of queries i and keys j (2D, they broadcast),
    -inf where a key is not seen, which only a tile with CHECK has. mask_ptr is the sample's,
    bias_ptr the head's; length is at most N.
    """
    scores = dots * (scale * UNIT)
    if bias_ptr is not None:
        ok = ((j >= 0) & (j < N)) & (i < S)
        bias = tl.load(bias_ptr + i.to(tl.int64) * bias_stride + j, mask=ok, other=0.0)
        scores += bias.to(tl.float32) * UNIT
    if CHECK:
        seen = (j >= 0) & (j < length)
        if mask_ptr is not None:
            seen = seen & (tl.load(mask_ptr + j, mask=(j >= 0) & (j < N), other=0) != 0)
        if IS_CAUSAL:
            seen = seen & (j <= i + (N - S))
        scores = tl.where(seen, scores, float("-inf"))
    return scores


@triton.jit
def kept(x, keep, keep_scale):
    """x after dropout."""
    return tl.where(keep, x * keep_scale, 0.0)


@triton.jit
def head_gate(gate_ptr, b, bh, GATE_PER_HEAD: tl.constexpr):
    """The gate of sample b and of its head with the number bh; 1 without one."""
    gate = tl.full([], 1.0, tl.float32)
    if gate_ptr is not None:
        at = b
        if GATE_PER_HEAD:
            at = bh
        gate = tl.load(gate_ptr + at).to(tl.float32)
    return gate


@triton.jit
def seen_keys(lengths_ptr, mask_ptr, b, N):
    """Up to where sample b has no hidden key, and up to where it has a seen one; mask_ptr is the
    sample's. A mask that only pads is then as cheap as a length.
    """
    length = N + tl.full([], 0, tl.int32)
    if lengths_ptr is not None:
        length = tl.minimum(length, tl.load(lengths_ptr + b).to(tl.int32))
    all_seen = length
    if mask_ptr is not None:
        hidden = tl.zeros([1024], tl.int32) + N
        seen = tl.zeros([1024], tl.int32)
        for start in range(0, N, 1024):
            j = start + tl.arange(0, 1024)
            is_seen = tl.load(mask_ptr + j, mask=j < N, other=0) != 0
            hidden = tl.minimum(hidden, tl.where(is_seen, N, j))
            seen = tl.maximum(seen, tl.where(is_seen, j + 1, 0))
        all_seen, length = tl.min(hidden, axis=0), tl.max(seen, axis=0)
    return all_seen, length


@triton.jit
def key_range(
    first, all_seen, length, S, N,
    IS_CAUSAL: tl.constexpr, SHIFT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Where the keys of queries first ... first + BLOCK_S begin, up to where all queries see all of
    a tile, and where they end.
    """
    all_see, end = all_seen, length
    if IS_CAUSAL:
        all_see = tl.minimum(all_see, first + 1 + N - S)
        end = tl.minimum(end, tl.minimum(first + BLOCK_S, S) + N - S)
    clean = tl.maximum(all_see, 0) // BLOCK_N * BLOCK_N
    if SHIFT > 0:
        clean = clean * 0 - SHIFT
    return -SHIFT, clean, end


@triton.jit
def _update(
    scores, v, keep, keep_scale, gate, acc, m, total,
    UNIT: tl.constexpr, HAS_DROPOUT: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: the sum of values, the maximum and the sum of
    probabilities.
    """
    new = tl.maximum(m, tl.max(scores, axis=1))
    zero = tl.where(new == float("-inf"), 0.0, new)
    if UNIT == 1.0:
        p, old = exponential(scores - zero[:, None], v), exponential(m - zero, v)
    else:
        p, old = tl.exp2(scores - zero[:, None]), tl.exp2(m - zero)
    total = total * old + tl.sum(p, axis=1)
    if HAS_DROPOUT:
        p = kept(p, keep, keep_scale)
    acc = product((p * gate).to(v.dtype), v, acc * old[:, None])
    return acc, new, total


@triton.jit
def _attend(
    acc, m, total, q, k_ptr, v_ptr, mask_ptr, bias_ptr, bias_stride, begin, end, first, row,
    k_stride, v_stride, S, N, length, scale, seed_low, seed_high, threshold, keep_scale,
    P: tl.constexpr, E: tl.constexpr, UNIT: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, CHECK: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Streams the keys begin ... end; row is the number of the first query in [B, H, S]."""
    i = first + tl.arange(0, BLOCK_S)
    for start in range(begin, end, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        k = row_tile(k_ptr, start, k_stride, N, E, BLOCK_N, BLOCK_E, CHECK)
        v = row_tile(v_ptr, start, v_stride, N, E, BLOCK_N, BLOCK_E, CHECK)
        v = without_hidden(v, j, mask_ptr, length, N, CHECK)
        dots = product(q, tl.trans(k), tl.zeros([BLOCK_S, BLOCK_N], tl.float32))
        scores = own_scores(
            dots, i[:, None], j[None, :], mask_ptr, bias_ptr, bias_stride, S, N, length, scale,
            IS_CAUSAL, CHECK, UNIT,
        )  # fmt: skip
        keep = True
        if HAS_DROPOUT:
            keep = keep_mask(
                row + tl.arange(0, BLOCK_S), P + start, seed_low, seed_high, threshold, P + N,
                BLOCK_N,
            )  # fmt: skip
        acc, m, total = _update(scores, v, keep, keep_scale, 1.0, acc, m, total, UNIT, HAS_DROPOUT)
    return acc, m, total


# Batches change their sizes: an argument that is 1 or a multiple of 16 must not compile again.
# Strides may: they are multiples of 16 for all batches or for none.
@triton.jit(do_not_specialize=["S", "N", "tiles", "seed_low", "seed_high", "threshold"])
def _prefix_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, prefix_k_ptrs, prefix_v_ptrs, index_ptrs, gate_ptr, mask_ptr, lengths_ptr,
    bias_ptr, out_ptr, lse_ptr,
    q_stride_b, q_stride_h, q_stride_s, k_stride_b, k_stride_g, k_stride_n,
    v_stride_b, v_stride_g, v_stride_n, bias_stride_b, bias_stride_h, bias_stride_s,
    S, N, tiles, scale, seed_low, seed_high, threshold, keep_scale,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, P: tl.constexpr, BEGINS: tl.constexpr,
    LENGTHS: tl.constexpr, GATE_PER_HEAD: tl.constexpr, IS_CAUSAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, SHIFT: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """BLOCK_S queries of one head: out and the log-sum-exp. The last queries, which see most, come
    first.
    """
    pid = tl.program_id(0)
    first = (tiles - 1 - pid % tiles) * BLOCK_S
    bh = pid // tiles
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    g = h // (H // G)
    row = bh.to(tl.int64) * S + first
    q_ptr += b * q_stride_b + h * q_stride_h
    k_ptr += b * k_stride_b + g * k_stride_g
    v_ptr += b * v_stride_b + g * v_stride_g
    if mask_ptr is not None:
        mask_ptr += b * N
    if bias_ptr is not None:
        bias_ptr += b * bias_stride_b + h * bias_stride_h
    q = row_tile(q_ptr, first, q_stride_s, S, E, BLOCK_S, BLOCK_E, True)
    acc = tl.zeros([BLOCK_S, BLOCK_E], tl.float32)
    m = tl.full([BLOCK_S], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_S], tl.float32)

    if P > 0:
        gate = head_gate(gate_ptr, b, bh, GATE_PER_HEAD)
        for start in range(0, P, BLOCK_P):
            cols = start + tl.arange(0, BLOCK_P)
            k = prefix_tile(
                prefix_k_ptrs, index_ptrs, b, g, cols, q_ptr,
                G, E, BEGINS, LENGTHS, BLOCK_P, BLOCK_E,
            )  # fmt: skip
            v = prefix_tile(
                prefix_v_ptrs, index_ptrs, b, g, cols, q_ptr,
                G, E, BEGINS, LENGTHS, BLOCK_P, BLOCK_E,
            )  # fmt: skip
            scores = product(q, tl.trans(k), tl.zeros([BLOCK_S, BLOCK_P], tl.float32))
            scores = scores * (gate * scale * UNIT)
            scores = tl.where((cols < P)[None, :], scores, float("-inf"))
            keep = True
            if HAS_DROPOUT:
                keep = keep_mask(
                    row + tl.arange(0, BLOCK_S), start, seed_low, seed_high, threshold, P + N,
                    BLOCK_P,
                )  # fmt: skip
            acc, m, total = _update(
                scores, v, keep, keep_scale, gate, acc, m, total, UNIT, HAS_DROPOUT
            )

    all_seen, length = seen_keys(lengths_ptr, mask_ptr, b, N)
    begin, clean, end = key_range(first, all_seen, length, S, N, IS_CAUSAL, SHIFT, BLOCK_S, BLOCK_N)
    acc, m, total = _attend(
        acc, m, total, q, k_ptr, v_ptr, mask_ptr, bias_ptr, bias_stride_s, begin, clean, first, row,
        k_stride_n, v_stride_n, S, N, length, scale, seed_low, seed_high, threshold, keep_scale,
        P, E, UNIT, IS_CAUSAL, HAS_DROPOUT, False, BLOCK_S, BLOCK_N, BLOCK_E,
    )  # fmt: skip
    acc, m, total = _attend(
        acc, m, total, q, k_ptr, v_ptr, mask_ptr, bias_ptr, bias_stride_s, clean, end, first, row,
        k_stride_n, v_stride_n, S, N, length, scale, seed_low, seed_high, threshold, keep_scale,
        P, E, UNIT, IS_CAUSAL, HAS_DROPOUT, True, BLOCK_S, BLOCK_N, BLOCK_E,
    )  # fmt: skip

    rows, e = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_E)
    row_ok = rows < S - first
    sees_nothing = total == 0.0
    total = tl.where(sees_nothing, 1.0, total)
    out = acc / total[:, None]
    lse = m / UNIT + tl.log(total)
    lse = tl.where(sees_nothing, float("-inf"), lse)
    at = out_ptr + row * E + rows[:, None] * E + e[None, :]
    out_ok = row_ok[:, None] & (e < E)[None, :]
    tl.store(at, out.to(out_ptr.dtype.element_ty), mask=out_ok)
    tl.store(lse_ptr + row + rows, lse, mask=row_ok)
