"""What the simulator's machine carries out beside arithmetic: matrices, shuffles, votes, branches,
barriers; the expected values are written from the PTX ISA.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from ptx import LANES, kernel, run, simulator

pytestmark = pytest.mark.backend("cuda_sim")
ALL = (1 << LANES) - 1
SEEDS = range(1, 7)
RANDOM = np.random.default_rng


def words_of(body: str, count: int, *inputs: np.ndarray, threads: int = LANES, shared: int = 0):
    """The words [count, threads] that a kernel stores at %q9 + 4 * threads * i; %q8 is the address
    of the thread's word in the first input, %q0 the input's.
    """
    found = np.zeros((count, threads), np.uint32)
    output = len(inputs)
    addresses = f"""
        mul.wide.u32 %q10, %r0, 4;
        add.s64 %q8, %q0, %q10;
        add.s64 %q9, %q{output}, %q10;
    """
    text = kernel(addresses + body, output + 1, threads)
    run(text, [*inputs, found], shared, threads=threads)
    return found


def loads(first: int, count: int, word: int = 0) -> str:
    """Registers %r{first} and so on from the thread's words of the first input."""
    lines = [f"ld.global.b32 %r{first + n}, [%q8+{128 * (word + n)}];" for n in range(count)]
    return "\n".join(lines)


def stores(first: int, count: int, word: int = 0, threads: int = LANES) -> str:
    lines = [
        f"st.global.b32 [%q9+{4 * threads * (word + n)}], %r{first + n};" for n in range(count)
    ]
    return "\n".join(lines)


def registers(first: int, count: int) -> str:
    return "{" + ", ".join(f"%r{first + n}" for n in range(count)) + "}"


# ---- matrices ----


def halves(dtype: str, values: np.ndarray) -> np.ndarray:
    """16 bits of each number, which the format holds."""
    if dtype == "f16":
        return values.astype(np.float16).view(np.uint16).astype(np.uint32)
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint32)


def rounded_to(dtype: str, values: np.ndarray) -> np.ndarray:
    if dtype == "f16":
        return values.astype(np.float16).astype(np.float64)
    bits = values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(np.float64)


def product(dtype: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """A [16, 16] B [16, 8] + C [16, 8] by one mma, in the fragments of csrc/cuda/mma.cuh."""
    given = np.zeros((10, LANES), np.uint32)
    of_a, of_b = halves(dtype, a), halves(dtype, b)
    of_c = c.astype(np.float32).view(np.uint32)
    places = [(0, 0), (8, 0), (0, 8), (8, 8)]
    for lane in range(LANES):
        i, j = lane // 4, 2 * (lane % 4)
        for n, (down, right) in enumerate(places):
            row = of_a[i + down]
            given[n, lane] = row[j + right] | row[j + right + 1] << 16
        for n in range(2):
            given[4 + n, lane] = of_b[j + 8 * n, i] | of_b[j + 8 * n + 1, i] << 16
        for n in range(4):
            given[6 + n, lane] = of_c[i + 8 * (n // 2), j + n % 2]
    body = f"""
        {loads(10, 10)}
        mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 {registers(20, 4)}, \
        {registers(10, 4)}, {registers(14, 2)}, {registers(16, 4)};
        {stores(20, 4)}
    """
    found = words_of(body, 4, given).view(np.float32)
    d = np.zeros((16, 8), np.float32)
    for lane in range(LANES):
        for n in range(4):
            d[lane // 4 + 8 * (n // 2), 2 * (lane % 4) + n % 2] = found[n, lane]
    return d


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_product_of_integers_is_exact(dtype: str) -> None:
    for seed in range(4):
        draw = RANDOM(seed)
        a, b = draw.integers(-9, 9, (16, 16)), draw.integers(-9, 9, (16, 8))
        c = draw.integers(-999, 999, (16, 8))
        assert np.array_equal(product(dtype, a, b, c), (a @ b + c).astype(np.float32))


@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_product(dtype: str) -> None:
    """To the rounding of 16 additions in float32; products of two such numbers are exact."""
    for seed in range(4):
        draw = RANDOM(seed)
        a = rounded_to(dtype, draw.normal(size=(16, 16)))
        b = rounded_to(dtype, draw.normal(size=(16, 8)))
        c = draw.normal(size=(16, 8)).astype(np.float32).astype(np.float64)
        bound = 16 * 2.0**-24 * (np.abs(a) @ np.abs(b) + np.abs(c))
        assert (np.abs(product(dtype, a, b, c) - (a @ b + c)) <= bound).all()


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_matrices_from_shared_memory(count: int, is_transposed: bool) -> None:
    """Rows in any order: lane 8 m + r passes the address of row r of matrix m."""
    draw = RANDOM(count)
    elements = draw.permutation(1 << 16)[: 64 * 8].reshape(64, 8).astype(np.uint16)
    rows = draw.permutation(64)[:LANES]
    given = np.concatenate([elements.view(np.uint32).reshape(8, LANES), [rows * 16]])
    places = "\n".join(f"st.shared.b32 [%r1+{128 * n}], %r{10 + n};" for n in range(8))
    body = f"""
        {loads(10, 9)}
        shl.b32 %r1, %r0, 2;
        {places}
        bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x{count}{".trans" if is_transposed else ""}.shared.b16 \
{registers(20, count)}, [%r18];
        {stores(20, count)}
    """
    found = words_of(body, count, given.astype(np.uint32), shared=1024)
    for m in range(count):
        matrix = elements[rows[8 * m : 8 * m + 8]].astype(np.uint32)
        matrix = matrix.T if is_transposed else matrix
        expected = matrix[:, ::2] | matrix[:, 1::2] << 16
        assert np.array_equal(found[m], expected.ravel())


# ---- shuffles and votes ----


def source_lane(mode: str, lane: int, by: int, width: int, last: int) -> int | None:
    """The lane that is read, inside a segment of `width` lanes of which `last` is the last that may
    be (for up, the first); None where it is out of range.
    """
    first = lane // width * width
    if mode == "up":
        return lane - by if lane - by >= first + last % width else None
    end = first + last % width
    lanes = {"down": lane + by, "bfly": lane ^ by, "idx": first + by % width}
    return lanes[mode] if lanes[mode] <= end else None


@pytest.mark.parametrize("width", [4, 8, 16, 32])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffle(mode: str, width: int) -> None:
    draw = RANDOM(width)
    values = draw.integers(0, 1 << 32, (1, LANES)).astype(np.uint32)
    cases = [(by, last) for by in (0, 1, 2, 3, 5, 8, 16, 31) for last in (0, 2, 31)]
    body = loads(10, 1)
    for n, (by, last) in enumerate(cases):
        body += f"""
        shfl.sync.{mode}.b32 %r11|%p1, %r10, {by}, {(LANES - width) << 8 | last}, -1;
        selp.b32 %r12, 1, 0, %p1;
        {stores(11, 2, 2 * n)}
        """
    found = words_of(body, 2 * len(cases), values)
    for n, (by, last) in enumerate(cases):
        sources = [source_lane(mode, lane, by, width, last) for lane in range(LANES)]
        read = [lane if source is None else source for lane, source in enumerate(sources)]
        assert np.array_equal(found[2 * n], values[0, read]), (by, last)
        assert found[2 * n + 1].tolist() == [source is not None for source in sources], (by, last)


VOTES: dict[str, Callable[[int, int], int]] = {
    "any.pred": lambda holds, lanes: int(holds & lanes != 0),
    "all.pred": lambda holds, lanes: int(holds & lanes == lanes),
    "ballot.b32": lambda holds, lanes: holds & lanes,
}


@pytest.mark.parametrize("mode", VOTES)
def test_vote(mode: str) -> None:
    """Of all lanes, and of two halves that vote apart; of a predicate and of its negation."""
    cases = [0, 1, ALL, ALL - 1, 0x0000FFFF, 0xFFFF0000, 0x12345678]
    body = "setp.lt.u32 %p2, %r0, 16;\n"
    for n, holds in enumerate(cases):
        to = "%r1" if mode == "ballot.b32" else "%p3"
        number = "" if mode == "ballot.b32" else "selp.b32 %r1, 1, 0, %p3;"
        body += f"shr.u32 %r2, {holds}, %r0;\nand.b32 %r2, %r2, 1;\nsetp.ne.b32 %p1, %r2, 0;\n"
        for k, source in enumerate(("%p1", "!%p1")):
            body += f"""
            vote.sync.{mode} {to}, {source}, -1;
            {number}
            {stores(1, 1, 4 * n + k)}
            @%p2 vote.sync.{mode} {to}, {source}, 65535;
            @!%p2 vote.sync.{mode} {to}, {source}, -65536;
            {number}
            {stores(1, 1, 4 * n + 2 + k)}
            """
    found = words_of(body, 4 * len(cases), np.zeros(1, np.uint32))
    for n, case in enumerate(cases):
        for k, holds in enumerate((case, ALL - case)):
            assert found[4 * n + k].tolist() == [VOTES[mode](holds, ALL)] * LANES
            low, high = VOTES[mode](holds, 0xFFFF), VOTES[mode](holds, 0xFFFF0000)
            assert found[4 * n + 2 + k].tolist() == [low] * 16 + [high] * 16


# ---- control flow ----


@pytest.mark.parametrize("seed", SEEDS)
def test_loops_that_end_apart_meet_again(seed: int) -> None:
    """Each lane adds up 0 .. lane % 7, in an outer loop of lane % 3 + 1 turns; then all 32 vote."""
    simulator().set_seed(seed)
    body = f"""
        rem.u32 %r1, %r0, 7;
        rem.u32 %r2, %r0, 3;
        mov.u32 %r3, 0;
        mov.u32 %r4, 0;
    $outer:
        mov.u32 %r5, 0;
    $inner:
        add.u32 %r3, %r3, %r5;
        add.u32 %r5, %r5, 1;
        setp.le.u32 %p1, %r5, %r1;
        @%p1 bra $inner;
        setp.eq.u32 %p2, %r4, %r2;
        add.u32 %r4, %r4, 1;
        @!%p2 bra $outer;
        and.b32 %r6, %r3, 1;
        setp.ne.b32 %p3, %r6, 0;
        vote.sync.ballot.b32 %r4, %p3, -1;
        {stores(3, 2)}
    """
    found = words_of(body, 2, np.zeros(1, np.uint32))
    sums = [(lane % 3 + 1) * sum(range(lane % 7 + 1)) for lane in range(LANES)]
    ballot = sum((value & 1) << lane for lane, value in enumerate(sums))
    simulator().set_seed(1)
    assert found.tolist() == [sums, [ballot] * LANES]


@pytest.mark.parametrize("seed", SEEDS)
def test_branches_that_lanes_take_apart(seed: int) -> None:
    """Four ways, one of which returns; the others shuffle among the lanes that are left."""
    simulator().set_seed(seed)
    body = f"""
        and.b32 %r1, %r0, 3;
        mov.u32 %r2, 100;
        setp.eq.u32 %p1, %r1, 3;
        @%p1 bra $leave;
        setp.eq.u32 %p1, %r1, 0;
        @%p1 bra $first;
        setp.eq.u32 %p1, %r1, 1;
        @%p1 mov.u32 %r2, 300;
        @!%p1 add.u32 %r2, %r2, 400;
        bra $together;
    $first:
        sub.u32 %r2, %r2, 1;
    $together:
        add.u32 %r2, %r2, %r0;
        shfl.sync.idx.b32 %r3, %r2, 30, 31, {0x77777777};
        {stores(2, 2)}
        ret;
    $leave:
    """
    found = words_of(body, 2, np.zeros(1, np.uint32))
    simulator().set_seed(1)
    values = [lane + [99, 300, 500, 0][lane % 4] for lane in range(LANES)]
    kept = [lane % 4 != 3 for lane in range(LANES)]
    assert found[0].tolist() == [value * keep for value, keep in zip(values, kept)]
    assert found[1].tolist() == [530 * keep for keep in kept]


@pytest.mark.parametrize("seed", SEEDS)
def test_one_side_arrives_and_the_other_waits(seed: int) -> None:
    """Two warps hand a buffer over and back eight times, by two barriers of 64 threads."""
    simulator().set_seed(seed)
    body = f"""
        mov.u32 %r1, 0;
        mov.u32 %r5, 0;
        and.b32 %r2, %r0, 31;
        shl.b32 %r3, %r2, 2;
        xor.b32 %r4, %r3, 124;
        setp.lt.u32 %p1, %r0, 32;
        @!%p1 bra $reader;
    $writer:
        mad.lo.u32 %r6, %r1, 100, %r2;
        st.shared.b32 [%r3], %r6;
        bar.arrive 1, 64;
        bar.sync 2, 64;
        add.u32 %r1, %r1, 1;
        setp.lt.u32 %p2, %r1, 8;
        @%p2 bra $writer;
        bra $end;
    $reader:
        bar.sync 1, 64;
        ld.shared.b32 %r6, [%r4];
        add.u32 %r5, %r5, %r6;
        bar.arrive 2, 64;
        add.u32 %r1, %r1, 1;
        setp.lt.u32 %p2, %r1, 8;
        @%p2 bra $reader;
    $end:
        {stores(5, 1, threads=64)}
    """
    found = words_of(body, 1, np.zeros(1, np.uint32), threads=64, shared=128)
    simulator().set_seed(1)
    assert found[0].tolist() == [0] * 32 + [100 * 28 + 8 * (31 - lane) for lane in range(LANES)]
