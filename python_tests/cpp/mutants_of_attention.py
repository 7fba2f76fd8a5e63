"""Faults of prefix_attention's kernels: each barrier and each wait, and a wrong operand in each
statement of inline assembly that they use.
"""

from __future__ import annotations

from typing import Any

from cases import Case
from mutate import BARRIER, COPY, NOTHING, OUTSIDE, RACE, WAIT, WARP_BARRIER, WRONG, Mutant

ATTENTION = "prefix_attention_{}_sm80<Config<bf16, 32>>"
FORWARD = "ops/prefix_attention/fwd_sm80.cu: "
QUERIES = "ops/prefix_attention/bwd_queries_sm80.cu: "
KEYS = "ops/prefix_attention/bwd_keys_sm80.cu: "
BIAS = "ops/prefix_attention/bwd_bias_sm80.cu: "
SHARED_TILES = "ops/prefix_attention/tiles.cuh: "


def tokens(
    id: str, s: int, n: int, inputs: str = "gate, key_mask", is_inference: bool = False, **more: Any
) -> Case:
    sizes = {"B": 1, "H": 1, "G": 1, "S": s, "N": n, "E": 32, "P_i": (5,), **more}
    attributes = {"scale": 32**-0.5, **sizes.pop("attributes", {})}
    fill = sizes.pop("fill", {})
    return Case(id, sizes, inputs, attributes, fill, is_inference=is_inference)


SEVERAL_TILES = tokens("several_tiles", 70, 150, is_inference=True)
FEW_QUERIES = tokens("few_queries", 9, 150, is_inference=True)
NOTHING_SEEN = tokens("nothing_seen", 70, 20, "key_mask", True, P_i=(), fill={"key_mask": 0})
GRADIENTS = tokens("gradients", 70, 150)
ONE_TILE = tokens("one_tile", 40, 150)
GRADIENTS_UNSEEN = tokens("gradients_unseen", 70, 20, "key_mask", P_i=(), fill={"key_mask": 0})
SHARED_BIAS = tokens("shared_bias", 70, 70, "bias shared by all, key_mask", B=2, H=2, G=2)
UNSEEN_BIAS = tokens(
    "unseen_bias", 70, 70, "bias shared by all, key_mask", B=2, H=2, G=2, fill={"key_mask": 0}
)
GROWING = tokens("growing", 70, 150, "", is_inference=True, attributes={"scale": 30.0})


def attention(
    id: str,
    kernel: str,
    place: str,
    caught: str,
    instruction: str = BARRIER,
    replacement: str = "",
    case: Case = SEVERAL_TILES,
) -> Mutant:
    return Mutant(
        f"prefix_attention {id}",
        ATTENTION.format(kernel),
        place,
        instruction,
        replacement,
        case,
        caught,
        "bfloat16",
    )


PREFIX_ATTENTION = [
    attention(
        "wait for a tile",
        "fwd",
        FORWARD + "for (int column = 0; column < end -> cp_async_wait",
        COPY,
        WAIT,
    ),
    attention(
        "wait for all groups but one",
        "fwd",
        FORWARD + "for (int column = 0; column < end -> cp_async_wait",
        COPY,
        WAIT,
        "cp.async.wait_group 1;",
    ),
    attention("barrier after a tile's wait", "fwd", FORWARD + "The tile is there, every", RACE),
    attention("commit of the next tile", "fwd", "", COPY, r"^cp\.async\.commit_group;$", ""),
    attention(
        "wait before the results",
        "fwd",
        FORWARD + "Results go where queries -> cp_async_wait",
        COPY,
        WAIT,
        "",
        NOTHING_SEEN,
    ),
    # A warp takes its queries into registers at the first of several tiles.
    attention(
        "barrier before rows are finished",
        "fwd",
        FORWARD + "Results go where queries -> sync_threads",
        NOTHING,
    ),
    attention(
        "barrier before rows that see nothing are finished",
        "fwd",
        FORWARD + "Results go where queries -> sync_threads",
        RACE,
        case=NOTHING_SEEN,
    ),
    attention(
        "barrier before warps are merged",
        "fwd",
        FORWARD + "Results go where queries -> sync_threads",
        RACE,
        case=FEW_QUERIES,
    ),
    attention(
        "barrier inside the merge of warps",
        "fwd",
        FORWARD + "all four warps' results are written",
        RACE,
        case=FEW_QUERIES,
    ),
    attention(
        "barrier of the warp before rows are stored",
        "fwd",
        "ops/prefix_attention/products.cuh: put_rows of the other lanes",
        RACE,
        WARP_BARRIER,
    ),
    attention(
        "barrier after every warp's end",
        "fwd",
        SHARED_TILES + "every warp's end is written before",
        RACE,
    ),
    attention(
        "wait for a tile of keys",
        "bwd_queries",
        QUERIES + "for (int column = 0; column < end -> cp_async_wait",
        COPY,
        WAIT,
        case=GRADIENTS,
    ),
    attention(
        "barrier after the wait for a tile of keys",
        "bwd_queries",
        QUERIES + "The tile is there, every",
        RACE,
        case=GRADIENTS,
    ),
    attention(
        "wait before dq",
        "bwd_queries",
        QUERIES + "dq goes where the queries were -> cp_async_wait",
        COPY,
        WAIT,
        case=GRADIENTS_UNSEEN,
    ),
    attention(
        "barrier before dq",
        "bwd_queries",
        QUERIES + "dq goes where the queries were -> sync_threads",
        RACE,
        case=GRADIENTS,
    ),
    attention(
        "barrier before dq of rows that see nothing",
        "bwd_queries",
        QUERIES + "dq goes where the queries were -> sync_threads",
        RACE,
        case=GRADIENTS_UNSEEN,
    ),
    attention(
        "barrier before the gate's sum",
        "bwd_queries",
        QUERIES + "every warp's sum is written before thread 0",
        RACE,
        case=GRADIENTS,
    ),
    attention(
        "wait for a tile of queries",
        "bwd_keys",
        KEYS + "while (!is_last) -> cp_async_wait",
        COPY,
        WAIT,
        case=GRADIENTS,
    ),
    attention(
        "barrier after the wait for a tile of queries",
        "bwd_keys",
        KEYS + "while (!is_last) -> sync_threads",
        RACE,
        case=GRADIENTS,
    ),
    attention(
        "barrier after the keys are kept",
        "bwd_keys",
        KEYS + "every warp has its keys before",
        RACE,
        case=GRADIENTS,
    ),
    # The last turn has started no copy.
    attention(
        "last wait for queries",
        "bwd_keys",
        KEYS + "buffer = 1 - buffer -> cp_async_wait",
        NOTHING,
        WAIT,
        case=GRADIENTS,
    ),
    attention(
        "barrier before a prefix's sums",
        "bwd_keys",
        KEYS + "Every warp has read the queries, or",
        RACE,
        case=GRADIENTS,
    ),
    attention(
        "barrier after a prefix's sums",
        "bwd_keys",
        KEYS + "all four warps' sums are written",
        RACE,
        case=GRADIENTS,
    ),
    attention(
        "barrier before dk and dv",
        "bwd_keys",
        KEYS + "the other warps have read the queries",
        RACE,
        case=ONE_TILE,
    ),
    attention(
        "barrier after the block's place",
        "bwd_keys",
        "ops/prefix_attention/walk.cuh: thread 0 has written them",
        RACE,
        case=GRADIENTS,
    ),
    attention(
        "barrier between samples",
        "bwd_bias",
        BIAS + "every thread has read the last sample's",
        RACE,
        case=UNSEEN_BIAS,
    ),
    attention(
        "barrier between heads",
        "bwd_bias",
        BIAS + "every warp is done with the last head's",
        RACE,
        case=SHARED_BIAS,
    ),
    attention(
        "wait for a head's tiles",
        "bwd_bias",
        BIAS + "One buffer, so the copies -> cp_async_wait",
        COPY,
        WAIT,
        case=SHARED_BIAS,
    ),
    attention(
        "barrier after the wait for a head's tiles",
        "bwd_bias",
        BIAS + "every thread's copies have landed",
        RACE,
        case=SHARED_BIAS,
    ),
]

# One wrong operand in each statement of inline assembly that the kernels use.
FOUR = r"\{(.*?), (.*?), (.*?), (.*?)\}"
MMA = rf"^(mma\S+) {FOUR}, {FOUR}, \{{(.*?), (.*?)\}}, {FOUR};"
MATRICES = r"^(ldmatrix\.sync\.aligned\.m8n8\.x4)(\.trans|)(\.shared\.b16 \{.*?\}), \[(.*?)\];"
ASYNC = r"^(cp\.async\.cg\.shared\.global) \[(.*?)\], \[(.*?)\], 16, (.*?);"


def wrong(
    id: str,
    instruction: str,
    replacement: str,
    caught: str = WRONG,
    place: str = "",
    case: Case = SEVERAL_TILES,
) -> Mutant:
    return attention(id, "fwd", place, caught, instruction, replacement, case)


VOCABULARY = [
    wrong(
        "mma with rows of A exchanged",
        MMA,
        r"\1 {\2, \3, \4, \5}, {\7, \6, \9, \8}, {\10, \11}, {\12, \13, \14, \15};",
    ),
    wrong(
        "mma with columns of A exchanged",
        MMA,
        r"\1 {\2, \3, \4, \5}, {\8, \7, \6, \9}, {\10, \11}, {\12, \13, \14, \15};",
    ),
    wrong(
        "mma with rows of B exchanged",
        MMA,
        r"\1 {\2, \3, \4, \5}, {\6, \7, \8, \9}, {\11, \10}, {\12, \13, \14, \15};",
    ),
    wrong(
        "mma with rows of D exchanged",
        MMA,
        r"\1 {\4, \5, \2, \3}, {\6, \7, \8, \9}, {\10, \11}, {\12, \13, \14, \15};",
    ),
    wrong(
        "mma with columns of C exchanged",
        MMA,
        r"\1 {\2, \3, \4, \5}, {\6, \7, \8, \9}, {\10, \11}, {\13, \12, \15, \14};",
    ),
    wrong("mma of another format", r"f32\.bf16\.bf16\.f32", "f32.f16.f16.f32"),
    Mutant(
        "prefix_attention mma of float16 with rows of A exchanged",
        "prefix_attention_fwd_sm80<Config<f16, 32>>",
        "",
        MMA,
        r"\1 {\2, \3, \4, \5}, {\7, \6, \9, \8}, {\10, \11}, {\12, \13, \14, \15};",
        SEVERAL_TILES,
        WRONG,
        "float16",
    ),
    wrong("ldmatrix transposed", MATRICES.replace("(\\.trans|)", "()"), r"\1.trans\3, [\4];"),
    wrong("ldmatrix not transposed", MATRICES.replace("(\\.trans|)", "(\\.trans)"), r"\1\3, [\4];"),
    wrong(
        "ldmatrix of the row's next elements",
        MATRICES,
        r"{ .reg .b32 %mutant; add.s32 %mutant, \4, 16; \1\2\3, [%mutant]; }",
        "nobody has written",
    ),
    wrong(
        "ldmatrix off its border",
        MATRICES,
        r"{ .reg .b32 %mutant; add.s32 %mutant, \4, 8; \1\2\3, [%mutant]; }",
        "is misaligned",
    ),
    wrong(
        "cp.async of 8 bytes",
        ASYNC,
        r"\1 [\2], [\3], 16, 8;",
        OUTSIDE,
    ),
    wrong(
        "cp.async of half the bytes that are there",
        r"^selp\.b32 (%r\d+), 16, 0, (%p\d+);",
        r"selp.b32 \1, 8, 0, \2;",
    ),
    wrong(
        "cp.async of all bytes, behind the tensor too",
        ASYNC,
        r"\1 [\2], [\3], 16, 16;",
        OUTSIDE,
    ),
    wrong("cp.async of no bytes", ASYNC, r"\1 [\2], [\3], 16, 0;"),
    wrong(
        "cp.async off its border",
        ASYNC,
        r"{ .reg .b64 %mutant; add.s64 %mutant, \3, 8; \1 [\2], [%mutant], 16, \4; }",
        "is misaligned",
    ),
    wrong(
        "ex2 of twice the number",
        r"^ex2\.approx\.ftz\.f32 (%f\d+), (%f\d+);",
        r"{ .reg .f32 %mutant; add.f32 %mutant, \2, \2; ex2.approx.ftz.f32 \1, %mutant; }",
    ),
    wrong(
        "maximum over the wrong lanes",
        r"(shfl\.sync\.bfly\.b32 %r\d+\|%p\d+, %r\d+), [%\w]+",
        r"\1, 4",
        WRONG,
        FORWARD + "largest = fmaxf(largest, shfl_xor(largest, 2))",
    ),
    wrong(
        "sum over the wrong lanes",
        r"(shfl\.sync\.bfly\.b32 %r\d+\|%p\d+, %r\d+), [%\w]+",
        r"\1, 4",
        WRONG,
        FORWARD + "const float sum = group_sum<4>(state.sum[m][half]);  // the four",
    ),
    wrong("vote that needs all lanes", r"vote\.sync\.any", "vote.sync.all", case=GROWING),
    wrong("barrier of half the threads", r"^bar\.sync 0;$", "bar.sync 0, 64;", RACE),
]
