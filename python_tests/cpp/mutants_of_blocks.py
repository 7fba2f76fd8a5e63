"""Faults of masked_weight's and symmetric_kl's kernels: barriers, orders of memory, operands."""

from __future__ import annotations

from cases import Case
from mutate import BARRIER, NOTHING, OUTSIDE, RACE, WARP_BARRIER, WRONG, Mutant

KL_SHORT, KL_LONG = (f"symmetric_kl_fwd_sm80<Config<float, {warps}>>" for warps in (1, 8))
KL = "ops/symmetric_kl/fwd_sm80.cu: "
ROWS = "ops/symmetric_kl/rows.cuh: "
# More rows than blocks, each of one block or of one warp.
LONG_ROWS = Case("long_rows", {"T": 30, "C": 1032}, "mask", is_inference=True)
SHORT_ROWS = Case("short_rows", {"T": 30, "C": 131}, "mask", is_inference=True)


def kl(
    id: str,
    place: str,
    caught: str,
    instruction: str = BARRIER,
    replacement: str = "",
    kernel: str = KL_LONG,
    case: Case = LONG_ROWS,
) -> Mutant:
    return Mutant(f"symmetric_kl {id}", kernel, place, instruction, replacement, case, caught)


SYMMETRIC_KL = [
    kl("barrier before a row's sums are merged", KL + "Every warp's sums are there", RACE),
    kl("barrier after the merge", KL + "They have been read: the block's next row", RACE),
    kl(
        "barrier before the ticket",
        KL + "The ticket releases the rows'",
        RACE,
        kernel=KL_SHORT,
        case=SHORT_ROWS,
    ),
    # The thread that takes the ticket has written the block's rows itself.
    kl("barrier before the ticket of long rows", KL + "The ticket releases the rows'", NOTHING),
    kl("relaxed ticket", KL + "s.is_last = take_ticket", RACE, "acq_rel", "relaxed"),
    kl("ticket that releases only", KL + "s.is_last = take_ticket", RACE, "acq_rel", "release"),
    kl("ticket that acquires only", KL + "s.is_last = take_ticket", RACE, "acq_rel", "acquire"),
    kl("ticket that counts by two", KL + "s.is_last = take_ticket", WRONG, ", 1;", ", 2;"),
    kl("barrier after the ticket", KL + "Every thread learns whether", RACE),
    kl("first barrier of block_sum", ROWS + "Every warp's sum is there", RACE),
    kl("second barrier of block_sum", ROWS + "All have read the sums", RACE),
    kl(
        "logits of the next columns",
        "",
        OUTSIDE,
        r"^(ld\.global\.nc\.v4\.u32 .*?), \[(%rd\d+)(?:\+0)?\];",
        r"\1, [\2+16];",
    ),
    kl(
        "rows read by the read-only path",
        KL + "own += p.rows[t]",
        "read-only path",
        r"ld\.global\.f32",
        "ld.global.nc.f32",
    ),
    kl(
        "shuffle from another lane",
        KL + "sums.merge(sums.of_lane",
        WRONG,
        r"(\|%p\d+, %r\d+), [%\w]+,",
        r"\1, 3,",
    ),
]

MASKED = "ops/masked_weight/fwd_sm80.cu: "
TILES = "ops/masked_weight/tiles.cuh: "
ATTRIBUTES = {"keep": 4000, "beta": 0.7, "alpha1": 0.5, "alpha2": 2.0}
MATRIX = Case(
    "matrix", {"Dout": 70, "Din": 133, "R": 8, "R2": 17}, attributes=ATTRIBUTES, is_inference=True
)
TIES = Case(
    "ties",
    {"Dout": 70, "Din": 133, "R": 1, "R2": 1},
    attributes={"keep": 4000},
    fill={"w0": 0.5, "v": 0.0, "b": 0.0, "row": 0.0, "col": 0.0},
    is_inference=True,
)


def masked(
    id: str,
    place: str,
    caught: str,
    instruction: str = BARRIER,
    replacement: str = "",
    case: Case = MATRIX,
) -> Mutant:
    return Mutant(
        f"masked_weight {id}",
        "masked_weight_fwd_sm80<Config<float>>",
        place,
        instruction,
        replacement,
        case,
        caught,
    )


MASKED_FORWARD = [
    masked("grid barrier without its first barrier", MASKED + "The one release below stands", RACE),
    masked(
        "grid barrier without its last barrier", MASKED + "The others go on when thread 0", RACE
    ),
    masked(
        "grid barrier with a relaxed add",
        MASKED + "atomic_add_release(p.arrivals, 1)",
        RACE,
        r"\.release",
        ".relaxed",
    ),
    masked(
        "grid barrier with a relaxed load",
        MASKED + "wait_until_at_least(p.arrivals",
        RACE,
        r"ld\.acquire",
        "ld.relaxed",
    ),
    masked(
        "grid barrier that nobody waits at",
        MASKED + "wait_until_at_least(p.arrivals",
        RACE,
        r"^(@!?%p\d+ bra)",
        r"// \1",
    ),
    masked(
        "barrier after the counts are cleared", MASKED + "Any thread may count in any bin", RACE
    ),
    masked(
        "barrier before the counts are published",
        MASKED + "All threads of the block have counted",
        RACE,
    ),
    masked(
        "count that is not atomic",
        MASKED + "atomic_count(&s.counts[key >> 21], 1)",
        RACE,
        r"^atom\.shared\.add\.u32 %r\d+, (\[.*?\]), ([%\w]+);",
        r"{ .reg .b32 %m; ld.shared.u32 %m, \1; add.u32 %m, %m, \2; st.shared.u32 \1, %m; }",
    ),
    masked(
        "count of two",
        MASKED + "atomic_count(&s.counts[key >> digit",
        WRONG,
        r"^(atom\.shared\.add\.u32 %r\d+, \[.*?\]), [%\w]+;",
        r"\1, 2;",
    ),
    masked("barrier before the first warp adds up", MASKED + "The first warp adds up all", RACE),
    masked(
        "barrier of the warp before the digit is written",
        MASKED + "every lane has read `stay`",
        RACE,
        WARP_BARRIER,
    ),
    masked("barrier after the digit is found", MASKED + "All threads read the digit", RACE),
    masked("first barrier around the factors", TILES + "All threads have multiplied what", RACE),
    masked(
        "second barrier around the factors", TILES + "A thread multiplies rows and columns", RACE
    ),
    masked(
        "lane's sum from another lane",
        MASKED + "const int before = shfl(value",
        WRONG,
        r"(shfl\.sync\.idx\.b32 %r\d+\|%p\d+, %r\d+), [%\w]+",
        r"\1, 0",
    ),
    masked(
        "warp's sum from another lane",
        MASKED + "own = shfl(sum_up_to_lane(own), 31)",
        WRONG,
        r"(shfl\.sync\.idx\.b32 %r\d+\|%p\d+, %r\d+), (%r\d+), \2,",
        r"\1, 30, \2,",
        TIES,
    ),
]

BANDS = Case("bands", {"Dout": 133, "Din": 70, "R": 8, "R2": 17}, attributes=ATTRIBUTES)
NO_RANK = Case("no_rank", {"Dout": 133, "Din": 70, "R": 0, "R2": 1}, attributes=ATTRIBUTES)
DERIVE = "ops/masked_weight/bwd_sm80.cu: "


def derive(id: str, place: str, caught: str, case: Case = BANDS) -> Mutant:
    return Mutant(
        f"masked_weight {id}",
        "masked_weight_bwd_sm80<Config<float>>",
        place,
        BARRIER,
        "",
        case,
        caught,
    )


MASKED_BACKWARD = [
    derive(
        "barrier before the factors are loaded", DERIVE + "The factors' last readers are done", RACE
    ),
    derive(
        "barrier before a tile is projected", DERIVE + "A thread multiplies ranks that others", RACE
    ),
    # The factors of the next tile have barriers of their own before they are multiplied.
    derive("barrier at the end of a turn", DERIVE + "The next tile's dW and dscore", NOTHING),
    derive(
        "barrier at the end of a turn without ranks",
        DERIVE + "The next tile's dW and dscore",
        RACE,
        NO_RANK,
    ),
]
