"""The simulator refuses each of the kernels in faults.cu, under every order of warps and blocks, and
says where: the kernel, the line of C++, block, warp and lane, the address, and what is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from torch import Tensor

SEEDS = range(1, 13)
TEXT = (Path(__file__).parent / "faults.cu").read_text()
pytestmark = pytest.mark.backend("cuda_sim")
Launch = Callable[..., Tensor]

LANE = r"block \d,0,0, warp \d, lane \d+"
WARP = r"block 0,0,0, warp \d"
SHARED = r"; shared address \d+"
TENSOR = r"; byte \d+ of a tensor of \d+"
UNWRITTEN = "reads memory that nobody has written"
UNORDERED = "with nothing that orders the two"
READ_OF_WRITTEN = f"race: reads what another thread writes, {UNORDERED}"
WRITE_OF_WRITTEN = f"race: writes what another thread writes, {UNORDERED}"
WRITE_OF_READ = f"race: writes what another thread reads, {UNORDERED}"
UNDER_WAY = (
    "touches what an asynchronous copy, for which its thread has not waited, is writing" + SHARED
)
MISALIGNED = r"is misaligned: expected .* multiple of 16, got 0x\w*8, which is 8 too high"
OUTSIDE = "is outside the block's shared memory of 512 bytes: "
NOT_GIVEN = r"touches memory that the kernel was not given: 4 bytes at 0x\w+, "
LAST_LANE = "block 0,0,0, warp 3, lane 31"


class Seen(NamedTuple):
    """One way in which a fault can show. Lines are given by their text in the kernel."""

    at: str  # the line of the instruction
    what: str
    other: str = ""  # the line that it disagrees with
    by: str = LANE


def _line(kernel: str, text: str) -> int:
    """The number of the line of a kernel that holds the text."""
    begin = TEXT.index(f" {kernel}(")
    body = TEXT[begin : TEXT.index("\n}\n", begin) + 2]
    assert body.count(text) == 1, (kernel, text)
    return TEXT.count("\n", 0, begin + body.index(text)) + 1


def _place(kernel: str, text: str) -> str:
    """An instruction and where it is; a line of the vocabulary is told with the kernel's."""
    return rf"\S+ \((\S+:\d+ in )?\S*faults\.cu:{_line(kernel, text)}, PTX line \d+\)"


def _message(kernel: str, seen: Seen) -> str:
    message = rf"simulator: kernel {kernel}, {seen.by}: {_place(kernel, seen.at)} {seen.what}"
    if seen.other:
        message += rf"; the other is {_place(kernel, seen.other)} of block \d+, warp \d"
    return message


ONE_WARP = {"threads": 32}
FULL = {"shared_bytes": 512}  # no more than the kernel's 128 threads write
BLOCKS = {"blocks": (3, 1, 1), "threads": 64, "words": 256, "is_output_written": True}
TOGETHER = {**BLOCKS, "is_cooperative": True}

# For each kernel its launch, and how its fault may show, which can depend on the order of warps.
FAULTS: dict[str, tuple[dict[str, object], list[Seen]]] = {
    # ---- lanes of one warp ----
    "no_warp_barrier": (
        {},
        [Seen("shared.word[t ^ 1];", READ_OF_WRITTEN + SHARED, "shared.word[t] = t * 3;")],
    ),
    "shuffle_for_a_barrier": (
        {},
        [Seen("shared.word[other];", READ_OF_WRITTEN + SHARED, "shared.word[t] = t * 3;")],
    ),
    "overwritten_while_read": (
        {},
        [Seen("shared.word[t] = 1000", WRITE_OF_READ + SHARED, "value = shared.word[t ^ 1];")],
    ),
    "barrier_of_half_a_warp": (
        {},
        [Seen("__syncwarp", "names some lanes only, whose order the simulator does not", by=WARP)],
    ),
    # ---- warps of one block ----
    "no_barrier": (
        {},
        [
            Seen("shared.word[(t + 32) % 128];", UNWRITTEN + SHARED),
            Seen("shared.word[(t + 32) % 128];", READ_OF_WRITTEN + SHARED, "word[t] = t * 3;"),
        ],
    ),
    "warp_barrier_between_warps": (
        {},
        [
            Seen("shared.word[(t + 32) % 128];", UNWRITTEN + SHARED),
            Seen("shared.word[(t + 32) % 128];", READ_OF_WRITTEN + SHARED, "word[t] = t;"),
        ],
    ),
    "double_buffer_a_barrier_short": (
        {},
        [
            Seen("= i + t;", WRITE_OF_READ + SHARED, "sum +="),
            Seen("sum +=", READ_OF_WRITTEN + SHARED, "= i + t;"),
        ],
    ),
    "overwritten_after_reads_by_all": (
        {},
        [
            Seen("word[0] = 8;", WRITE_OF_READ + "; shared address 0", "again = words.word[0];"),
            Seen("word[0] = 8;", WRITE_OF_READ + "; shared address 0", "once = words.word[0];"),
            Seen("once = words.word[0];", READ_OF_WRITTEN + "; shared address 0", "word[0] = 8;"),
            Seen("again = words.word[0];", READ_OF_WRITTEN + "; shared address 0", "word[0] = 8;"),
        ],
    ),
    "count_without_atomic": (
        {},
        [
            Seen("+= 1;", WRITE_OF_READ + "; shared address 0", "+= 1;"),
            Seen("+= 1;", READ_OF_WRITTEN + "; shared address 0", "+= 1;"),
        ],
    ),
    "one_value_from_all_threads": (
        {},
        [Seen("shared.word[0] = 7;", WRITE_OF_WRITTEN + "; shared address 0", "word[0] = 7;")],
    ),
    "arrive_for_a_wait": (
        {},
        [
            Seen("shared.word[64 + t];", UNWRITTEN + SHARED),
            Seen("shared.word[64 + t];", READ_OF_WRITTEN + SHARED, "2 * shared.word"),
        ],
    ),
    # ---- blocks ----
    "flag_without_release": (
        TOGETHER,
        [Seen("sum += params.out[i];", READ_OF_WRITTEN + TENSOR, "params.out[block] = 11")],
    ),
    "release_without_barrier": (
        TOGETHER,
        [
            Seen("sum += params.out[i];", READ_OF_WRITTEN + TENSOR, "params.out[block * 64 + t]"),
            Seen("params.out[block * 64 + t]", WRITE_OF_READ + TENSOR, "sum += params.out[i];"),
        ],
    ),
    "acquire_without_barrier": (
        TOGETHER,
        [
            Seen("if (t < 32)", READ_OF_WRITTEN + TENSOR, "params.out[block] = 11"),
            Seen("params.out[block] = 11", WRITE_OF_READ + TENSOR, "if (t < 32)"),
        ],
    ),
    "a_lane_waits_for_its_warp": (
        TOGETHER,
        [
            Seen("= params.out[0];", READ_OF_WRITTEN + TENSOR, "params.out[0] = 7;"),
            Seen("params.out[0] = 7;", WRITE_OF_READ + TENSOR, "= params.out[0];"),
        ],
    ),
    "ticket_without_barrier": (
        BLOCKS,
        [
            Seen("sum += params.out[i];", READ_OF_WRITTEN + TENSOR, "params.out[block * 64 + t]"),
            Seen("params.out[block * 64 + t]", WRITE_OF_READ + TENSOR, "sum += params.out[i];"),
        ],
    ),
    "blocks_add_to_one_word": (
        BLOCKS,
        [
            Seen("+= 1;", READ_OF_WRITTEN + "; byte 0 of a tensor of 1024", "+= 1;"),
            Seen("+= 1;", WRITE_OF_READ + "; byte 0 of a tensor of 1024", "+= 1;"),
        ],
    ),
    "blocks_store_one_value": (
        BLOCKS,
        [Seen("= 7;", WRITE_OF_WRITTEN + "; byte 0 of a tensor of 1024", "= 7;")],
    ),
    "blocks_store_their_numbers": (
        BLOCKS,
        [Seen("= block_index_x();", WRITE_OF_WRITTEN + TENSOR, "= block_index_x();")],
    ),
    # ---- asynchronous copies ----
    "copy_from_8_bytes_off": (ONE_WARP, [Seen("cp_async_16", MISALIGNED)]),
    "copy_nothing_from_8_bytes_off": (ONE_WARP, [Seen("cp_async_16", MISALIGNED)]),
    "copy_without_wait": (ONE_WARP, [Seen("params.out[t] =", UNDER_WAY, "cp_async_16")]),
    "barrier_for_a_wait": ({}, [Seen("params.out[t] =", UNDER_WAY, "cp_async_16")]),
    "wait_for_the_older_stage": ({}, [Seen("params.out[t] =", UNDER_WAY, "cp_async_16")]),
    "wait_for_a_barrier": (
        ONE_WARP,
        [Seen("params.out[t] =", READ_OF_WRITTEN + SHARED, "cp_async_16")],
    ),
    "groups_of_half_warps": (
        ONE_WARP,
        [Seen("if (t < 16) params.out[t]", UNDER_WAY, "// of the lower half")],
    ),
    "refill_while_others_read": (
        {},
        [
            Seen("params.in, true);", WRITE_OF_READ + SHARED, "params.out[t] ="),
            Seen("params.out[t] =", UNDER_WAY, "params.in, true);"),
        ],
    ),
    "copy_past_the_end": (FULL, [Seen("cp_async_16", OUTSIDE + r"16 bytes at \d+$")]),
    "return_with_a_copy_under_way": (
        ONE_WARP,
        [Seen("}", "while a copy that it started is under way")],
    ),
    # ---- memory ----
    "load_from_8_bytes_off": ({"words": 512}, [Seen("load_16", MISALIGNED)]),
    "matrix_from_8_bytes_off": (ONE_WARP, [Seen("ldmatrix_x1", MISALIGNED)]),
    "write_past_the_end": (
        FULL,
        [Seen("word[t + 1] = 7;", OUTSIDE + "4 bytes at 512$", "", LAST_LANE)],
    ),
    "read_past_the_tile": (
        {},
        [Seen("word[t + 1];", UNWRITTEN + "; shared address 512$", "", LAST_LANE)],
    ),
    "read_past_the_tile_into_the_next": (
        {},
        [
            Seen("word[t + 1];", UNWRITTEN + "; shared address 512$", "", LAST_LANE),
            Seen("word[t + 1];", READ_OF_WRITTEN + "; shared address 512", "= 100", LAST_LANE),
            Seen("= 100", WRITE_OF_READ + "; shared address 512", "word[t + 1];"),
        ],
    ),
    "read_past_the_tensor": ({}, [Seen("params.in[", NOT_GIVEN)]),
    "write_past_the_tensor": (
        {},
        [
            Seen(
                "= 7;",
                NOT_GIVEN + "0 bytes behind the end of a tensor of 512 bytes$",
                "",
                LAST_LANE,
            )
        ],
    ),
    "read_an_output": ({}, [Seen("+= 7;", UNWRITTEN + TENSOR)]),
    "unwritten_flag": ({}, [Seen("? 7 : 8;", UNWRITTEN + SHARED)]),
    "unwritten_maximum": ({}, [Seen("fmaxf", UNWRITTEN + SHARED)]),
    "read_only_path_of_written": (
        {"threads": 32, "words": 1024},
        [Seen("other =", "reads by the read-only path what this kernel writes" + TENSOR, "{{7, 7")],
    ),
    "written_after_the_read_only_path": (
        {},
        [
            Seen(
                "params.counters[0] = 7;",
                "writes what this kernel reads by the read-only path; byte 0 of a tensor of 16",
                "load_global_16",
            )
        ],
    ),
}


@pytest.mark.parametrize("kernel", FAULTS)
def test_fault_is_named(kernel: str, launch: Launch) -> None:
    how, ways = FAULTS[kernel]
    expected = "|".join(f"(?:{_message(kernel, seen)})" for seen in ways)
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=f"^(?:{expected})"):
            launch("faults", kernel, seed, **how)


def test_a_wait_for_too_few_blocks_is_named_where_one_comes_late(launch: Launch) -> None:
    """Which blocks are ordered by a counter depends on what it was when it was read."""
    kernel, write, read = (
        "wait_for_a_block_too_few",
        "params.out[block] = 11",
        "sum += params.out[i];",
    )
    read_early = _message(kernel, Seen(read, READ_OF_WRITTEN + TENSOR, write))
    written_late = _message(kernel, Seen(write, WRITE_OF_READ + TENSOR, read))
    caught = 0
    for seed in SEEDS:
        try:
            launch("faults", kernel, seed, **TOGETHER)
        except RuntimeError as fault:
            assert re.match(f"{read_early}|{written_late}", str(fault)), fault
            caught += 1
    assert caught > len(SEEDS) / 2


# For each kernel its launch and two groups of lanes with the lines at which they stand.
LANES_APART: dict[str, tuple[dict[str, object], list[tuple[str, str]]]] = {
    "two_shuffles": (ONE_WARP, [("0-4", "shfl(t, 0)"), ("5-31", "shfl(t, 0)")]),
    "shuffle_in_two_branches": (
        ONE_WARP,
        [("0-15", "value = shfl(t, 0);"), ("16-31", "shfl(100 + t, 16);")],
    ),
    "barrier_in_two_branches": (
        {"threads": 64},
        [
            ("0-15", "sync_threads();  // of the lower"),
            ("16-31", "sync_threads();  // of the upper"),
        ],
    ),
}


@pytest.mark.parametrize("kernel", LANES_APART)
def test_lanes_that_wait_for_each_other_are_named(kernel: str, launch: Launch) -> None:
    how, groups = LANES_APART[kernel]
    first, second = (rf"; lanes {lanes} at {_place(kernel, at)}" for lanes, at in groups)
    expected = (
        rf"^simulator: kernel {kernel}, block 0,0,0, warp \d: lanes wait for each other at"
        f" different instructions({first}{second}|{second}{first})$"
    )
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=expected):
            launch("faults", kernel, seed, **how)


@pytest.mark.parametrize(
    ("kernel", "at", "warp", "missing"),
    [
        ("return_early", "multiply_add", r"block 0,0,0, warp 1", "5"),
        ("shuffle_in_a_branch", "shfl(t, 0)", r"block 0,0,0, warp \d", "1, 3, 5.*"),
    ],
)
def test_lanes_that_returned_before_a_warp_wide_instruction_are_named(
    kernel: str, at: str, warp: str, missing: str, launch: Launch
) -> None:
    place = _place(kernel, at)
    expected = (
        rf"^simulator: kernel {kernel}, {warp}: "
        f"({place} needs lane {missing[0]}, which has returned"
        f"|lanes wait .*; lanes .* at {place}; lanes {missing} returned)$"
    )
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=expected):
            launch("faults", kernel, seed, threads=64)


def test_a_barrier_that_a_warp_does_not_reach_is_a_deadlock(launch: Launch) -> None:
    barrier = _place("return_before_barrier", "sync_threads();")
    waiting = "".join(
        rf"; block 0,0,0, warp {warp}: waits at barrier 0 \(96 of 128 threads\) at {barrier}"
        for warp in range(3)
    )
    expected = (
        "^simulator: kernel return_before_barrier: deadlock"
        f"{waiting}; block 0,0,0, warp 3: returned$"
    )
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=expected):
            launch("faults", "return_before_barrier", seed)


def test_a_barrier_for_different_counts_is_named(launch: Launch) -> None:
    """The halves of the block meet at it, or one after the other, and then the second half waits."""
    kernel, start = "barrier_for_the_wrong_count", "^simulator: kernel barrier_for_the_wrong_count"
    narrow, wide = _place(kernel, "<1>(64);"), _place(kernel, "<1>(128);")
    expected = "|".join(
        (
            rf"{start}, block 0,0,0, warp [01]: {narrow} waits for 64 threads at barrier 1, at which others wait for 128$",
            rf"{start}, block 0,0,0, warp [23]: {wide} waits for 128 threads at barrier 1, at which others wait for 64$",
            rf"{start}: deadlock;.*; block 0,0,0, warp 3: waits at barrier 1 \(64 of 128 threads\) at {wide}$",
        )
    )
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=expected):
            launch("faults", kernel, seed)


def test_a_flag_of_a_block_that_does_not_run_is_a_deadlock(launch: Launch) -> None:
    flag = _place("flags_alone", "wait_until_at_least")
    expected = (
        "^simulator: kernel flags_alone: deadlock"
        rf"(; block \d,0,0, warp 0: waits for a flag at {flag}){{2}}"
        "; the launch is not cooperative, so a block must not wait for another one's flag$"
    )
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=expected):
            launch("faults", "flags_alone", seed, blocks=(3, 1, 1), threads=32)
