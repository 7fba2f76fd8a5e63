"""How the simulator's machine loads, stores, copies and counts: widths, vectors, spaces."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from ptx import LANES, SHARED_WINDOW, kernel, run, simulator

pytestmark = pytest.mark.backend("cuda_sim")
RANDOM = np.random.default_rng
ALL = (1 << LANES) - 1
# 64 words of each lane: %q8 is the address of the lane's part of the input, %q9 that of the output.
WORDS = 64
ADDRESSES = f"""
    mul.wide.u32 %q10, %r0, {4 * WORDS};
    add.s64 %q8, %q0, %q10;
    add.s64 %q9, %q1, %q10;
    mul.lo.u32 %r1, %r0, {4 * WORDS};
"""


def memory(seed: int) -> tuple[np.ndarray, np.ndarray]:
    given = RANDOM(seed).integers(0, 1 << 32, (LANES, WORDS)).astype(np.uint32)
    return given, np.zeros_like(given)


def read(line: np.ndarray, at: int, kind: str) -> int:
    """The number of a type at a byte of a lane's part."""
    count = int(kind[1:]) // 8
    piece = line.view(np.uint8)[at : at + count].tobytes()
    return int.from_bytes(piece, "little", signed=kind[0] == "s")


KINDS = [f"{letter}{bits}" for letter in "bsu" for bits in (8, 16, 32, 64)] + ["f32"]
REGISTERS = {16: "h", 32: "r", 64: "q"}


def fitting(kind: str) -> list[int]:
    """The widths of registers that a value may go to."""
    width = 32 if kind == "f32" else max(int(kind[1:]), 16)
    return [width] if kind == "f32" else [bits for bits in REGISTERS if bits >= width]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", ["global", "shared", "generic", "param"])
def test_load_extends_into_the_register(space: str, kind: str) -> None:
    """One value, and vectors of two and four where they are up to 16 bytes."""
    given, found = memory(1)
    size = int(kind[1:]) // 8
    body, slots = ADDRESSES, []
    for vector in (1, 2, 4):
        if size * vector > 16 or (space == "param" and vector > 1):
            continue
        for bits in fitting(kind):
            slot, at = 16 * len(slots), 16 * (len(slots) % 4) if vector > 1 else size
            slots.append((bits, vector, at))
            names = [f"%{REGISTERS[bits]}{n}" for n in range(20, 20 + vector)]
            to = "{" + ", ".join(names) + "}" if vector > 1 else names[0]
            base = {"shared": "%r1", "param": "given", "generic": "%q8", "global": "%q8"}[space]
            prefix = {"generic": "ld"}.get(space, f"ld.{space}")
            form = f".v{vector}" if vector > 1 else ""
            body += f"{prefix}{form}.{kind} {to}, [{base}+{at + (space == 'param') * 16}];\n"
            for n, name in enumerate(names):
                body += f"st.global.b{bits} [%q9+{slot + n * bits // 8}], {name};\n"
    if space == "shared":
        copies = "".join(
            f"ld.global.b64 %q11, [%q8+{8 * n}];\nst.shared.b64 [%r1+{8 * n}], %q11;\n"
            for n in range(WORDS // 2)
        )
        body = body.replace(ADDRESSES, ADDRESSES + copies)
    more = given[0].tobytes() if space == "param" else b""
    text = kernel(body, more_bytes=len(more))
    run(text, [given, found], 4 * WORDS * LANES, more)
    for slot, (bits, vector, at) in enumerate(slots):
        for lane in range(LANES):
            line = given[0 if space == "param" else lane]
            for n in range(vector):
                expected = read(line, at + n * size, kind) & ((1 << bits) - 1)
                assert read(found[lane], 16 * slot + n * bits // 8, f"u{bits}") == expected


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "f32"])
@pytest.mark.parametrize("space", ["global", "global.cs", "shared", "generic"])
def test_store_cuts_the_register(space: str, kind: str) -> None:
    """The low bytes of the register go to memory, and the neighbours stay."""
    given, found = memory(2)
    found[:] = 0xEEEEEEEE
    size = int(kind[1:]) // 8
    body, slots = ADDRESSES, []
    for vector in (1, 2, 4):
        if size * vector > 16:
            continue
        for bits in fitting(kind):
            at = 16 * len(slots) + (size if vector == 1 and size < 8 else 0)
            slots.append((bits, vector, at))
            names = [f"%{REGISTERS[bits]}{n}" for n in range(20, 20 + vector)]
            loads = "".join(
                f"ld.global.b{bits} {name}, [%q8+{32 * (len(slots) % 7) + 8 * n}];\n"
                for n, name in enumerate(names)
            )
            source = "{" + ", ".join(names) + "}" if vector > 1 else names[0]
            base = "%r1" if space == "shared" else "%q9"
            prefix = {"generic": "st"}.get(space, f"st.{space}")
            form = f".v{vector}" if vector > 1 else ""
            body += f"{loads}{prefix}{form}.{kind} [{base}+{at}], {source};\n"
    if space == "shared":
        fill = "".join(
            f"st.shared.b32 [%r1+{4 * n}], {0xEEEEEEEE};\n" for n in range(4 * len(slots))
        )
        body = body.replace(ADDRESSES, ADDRESSES + fill) + "".join(
            f"ld.shared.b32 %r2, [%r1+{4 * n}];\nst.global.b32 [%q9+{4 * n}], %r2;\n"
            for n in range(4 * len(slots))
        )
    run(kernel(body), [given, found], shared_bytes=4 * WORDS * LANES)
    for lane in range(LANES):
        expected = bytearray(b"\xee" * (4 * WORDS))
        for slot, (_, vector, at) in enumerate(slots, 1):
            for n in range(vector):
                value = read(given[lane], 32 * (slot % 7) + 8 * n, f"u{8 * size}")
                expected[at + n * size : at + (n + 1) * size] = value.to_bytes(size, "little")
        assert found[lane].tobytes() == bytes(expected)


def test_generic_addresses_of_each_space() -> None:
    """To generic and back: a store through one form is seen by a load through the other."""
    given, found = memory(3)
    body = f"""{ADDRESSES}
        ld.global.b32 %r2, [%q8];
        cvt.u64.u32 %q11, %r1;
        cvta.shared.u64 %q12, %q11;
        st.b32 [%q12+4], %r2;
        ld.shared.b32 %r3, [%r1+4];
        cvta.to.shared.u64 %q13, %q12;
        cvt.u32.u64 %r4, %q13;
        add.u32 %r2, %r2, 1;
        st.shared.b32 [%r4+8], %r2;
        ld.b32 %r5, [%q12+8];
        cvta.to.global.u64 %q14, %q9;
        st.global.v2.b32 [%q14], {{%r3, %r5}};
        cvta.global.u64 %q15, %q14;
        st.b64 [%q15+8], %q12;
    """
    run(kernel(body), [given, found], shared_bytes=4 * WORDS * LANES)
    assert np.array_equal(found[:, 0], given[:, 0])
    assert np.array_equal(found[:, 1], given[:, 0] + np.uint32(1))
    places = SHARED_WINDOW + 4 * WORDS * np.arange(LANES, dtype=np.uint64)
    assert np.array_equal(found[:, 2:4].copy().view(np.uint64)[:, 0], places)


# ---- atomics ----


def signed(value: int) -> int:
    return value - (1 << 32) if value >> 31 else value


COMBINED: dict[str, Callable[[int, int, int], int]] = {
    "add.u32": lambda old, a, b: (old + a) & ALL,
    "add.s32": lambda old, a, b: (old + a) & ALL,
    "min.u32": lambda old, a, b: min(old, a),
    "max.u32": lambda old, a, b: max(old, a),
    "min.s32": lambda old, a, b: min(old, a, key=signed),
    "max.s32": lambda old, a, b: max(old, a, key=signed),
    "and.b32": lambda old, a, b: old & a,
    "or.b32": lambda old, a, b: old | a,
    "exch.b32": lambda old, a, b: a,
    "cas.b32": lambda old, a, b: b if old == a else old,
}
SPACES = {"global": ("%q9", ".global"), "shared": ("%r1", ".shared"), "generic": ("%q9", "")}


@pytest.mark.parametrize("name", COMBINED)
@pytest.mark.parametrize("space", SPACES)
def test_atomic(space: str, name: str) -> None:
    """Each lane on a word of its own; every second lane of cas finds what it compares with."""
    given, found = memory(4)
    given[::2, 1] = given[::2, 0]
    base, form = SPACES[space]
    operation, kind = name.split(".")
    third = ", %r4" if operation == "cas" else ""
    body = f"""{ADDRESSES}
        ld.global.v2.b32 {{%r2, %r3}}, [%q8];
        ld.global.b32 %r4, [%q8+8];
        st{form}.b32 [{base}], %r2;
        atom{form}.{operation}.{kind} %r5, [{base}], %r3{third};
        ld{form}.b32 %r6, [{base}];
        st.global.v2.b32 [%q9+8], {{%r5, %r6}};
    """
    run(kernel(body), [given, found], shared_bytes=4 * WORDS * LANES)
    for lane in range(LANES):
        old, a, b = map(int, given[lane, :3])
        assert found[lane, 2:4].tolist() == [old, COMBINED[name](old, a, b)]


@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomics_on_one_word(space: str) -> None:
    """128 lanes add to it: every value before is seen once. Then some add without asking for it."""
    found = np.zeros((2, 128), np.uint32)
    counter = np.zeros(1, np.uint32)
    at = "%q0" if space == "global" else "%r9"
    body = f"""
        mov.u32 %r9, 0;
        mul.wide.u32 %q10, %r0, 4;
        add.s64 %q9, %q1, %q10;
        setp.eq.u32 %p1, %r0, 0;
        @%p1 st.{space}.b32 [{at}], 0;
        bar.sync 0;
        atom.{space}.add.u32 %r2, [{at}], 3;
        st.global.b32 [%q9], %r2;
        bar.sync 0;
        setp.lt.u32 %p2, %r0, 40;
        @%p2 red.{space}.add.u32 [{at}], 1;
        bar.sync 0;
        ld.{space}.b32 %r3, [{at}];
        st.global.b32 [%q9+512], %r3;
    """
    run(kernel(body, threads=128), [counter, found], shared_bytes=16, threads=128)
    assert sorted(found[0].tolist()) == list(range(0, 3 * 128, 3))
    assert found[1].tolist() == [3 * 128 + 40] * 128


# ---- asynchronous copies ----


@pytest.mark.parametrize(
    ("cache", "size", "read_bytes"),
    [("cg", 16, n) for n in (0, 1, 4, 8, 12, 16, None)]
    + [("ca", 8, n) for n in (0, 4, 8, None)]
    + [("ca", 4, n) for n in (0, 4, None)]
    + [("ca", 16, n) for n in (0, 16)],
)
def test_copy_fills_with_zeros(cache: str, size: int, read_bytes: int | None) -> None:
    given, found = memory(5)
    given_size = "" if read_bytes is None else f", {read_bytes}"
    body = f"""{ADDRESSES}
        cp.async.{cache}.shared.global [%r1+16], [%q8+16], {size}{given_size};
        cp.async.wait_all;
        ld.shared.b{8 * min(size, 8)} %{"r" if size == 4 else "q"}11, [%r1+16];
        st.global.b{8 * min(size, 8)} [%q9], %{"r" if size == 4 else "q"}11;
    """
    if size == 16:
        body += "ld.shared.b64 %q12, [%r1+24];\nst.global.b64 [%q9+8], %q12;\n"
    run(kernel(body), [given, found], shared_bytes=4 * WORDS * LANES)
    kept = size if read_bytes is None else read_bytes
    for lane in range(LANES):
        expected = given[lane].tobytes()[16 : 16 + kept] + bytes(size - kept)
        assert found[lane].tobytes()[:size] == expected


@pytest.mark.parametrize("seed", range(1, 7))
def test_groups_of_copies(seed: int) -> None:
    """Of three groups, the wait for all but n of the newest lets the others be read."""
    given, found = memory(6)
    simulator().set_seed(seed)
    body = ADDRESSES
    for n in range(3):
        body += f"cp.async.cg.shared.global [%r1+{16 * n}], [%q8+{16 * n}], 16;\n"
        body += "cp.async.commit_group;\n"
    for n in range(3):
        body += f"""
        cp.async.wait_group {2 - n};
        ld.shared.v4.b32 {{%r2, %r3, %r4, %r5}}, [%r1+{16 * n}];
        st.global.v4.b32 [%q9+{16 * n}], {{%r2, %r3, %r4, %r5}};
        """
    run(kernel(body), [given, found], shared_bytes=4 * WORDS * LANES)
    simulator().set_seed(1)
    assert np.array_equal(found[:, :12], given[:, :12])


@pytest.mark.parametrize("seed", range(1, 4))
def test_group_that_is_under_way_must_not_be_read(seed: int) -> None:
    given, found = memory(6)
    simulator().set_seed(seed)
    body = f"""{ADDRESSES}
        cp.async.cg.shared.global [%r1], [%q8], 16;
        cp.async.commit_group;
        cp.async.cg.shared.global [%r1+16], [%q8], 16;
        cp.async.commit_group;
        cp.async.wait_group 1;
        ld.shared.b32 %r2, [%r1+16];
        cp.async.wait_all;
    """
    with pytest.raises(RuntimeError, match="ld.shared.b32.* asynchronous copy"):
        run(kernel(body), [given, found], shared_bytes=4 * WORDS * LANES)
    simulator().set_seed(1)
