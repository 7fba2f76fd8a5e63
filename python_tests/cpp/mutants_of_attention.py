"""Faults of prefix_attention's kernels: each barrier and each wait."""

from __future__ import annotations

from typing import Any

from cases import Case
from mutate import BARRIER, COPY, NOTHING, RACE, WAIT, WARP_BARRIER, Mutant

ATTENTION = "prefix_attention_{}_sm80<Config<bf16, {}>>"
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
# Of wide heads each warp has columns of its own, which it keeps in registers.
WIDE = tokens("wide", 70, 150, E=96)
WIDE_ONE_TILE = tokens("wide_one_tile", 40, 150, E=96)
GRADIENTS_UNSEEN = tokens("gradients_unseen", 70, 20, "key_mask", P_i=(), fill={"key_mask": 0})
SHARED_BIAS = tokens("shared_bias", 70, 70, "bias shared by all, key_mask", B=2, H=2, G=2)
UNSEEN_BIAS = tokens(
    "unseen_bias", 70, 70, "bias shared by all, key_mask", B=2, H=2, G=2, fill={"key_mask": 0}
)


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
        ATTENTION.format(kernel, case.sizes["E"]),
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
    # At this head size queries are read from shared memory at each step.
    attention(
        "barrier before rows are finished",
        "fwd",
        FORWARD + "Results go where queries -> sync_threads",
        RACE,
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
        f"{COPY}|while a copy that it started is under way",
        WAIT,
        case=GRADIENTS_UNSEEN,
    ),
    # A warp takes its queries into registers at the first of several tiles.
    attention(
        "barrier before dq",
        "bwd_queries",
        QUERIES + "dq goes where the queries were -> sync_threads",
        NOTHING,
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
        case=WIDE,
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
        case=WIDE_ONE_TILE,
    ),
    attention(
        "barrier before sums are exchanged",
        "bwd_keys",
        KEYS + "every warp has read the queries that lie where sums",
        RACE,
        case=ONE_TILE,
    ),
    attention(
        "barrier between the halves of an exchange",
        "bwd_keys",
        KEYS + "the partner's sums are there before",
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
