"""A wrong operand in each statement of inline assembly that prefix_attention's forward uses."""

from __future__ import annotations

from cases import Case
from mutants_of_attention import FORWARD, SEVERAL_TILES, SHARED_TILES, attention, tokens
from mutate import OUTSIDE, RACE, WRONG, Mutant

LONG_PREFIX = tokens("long_prefix", 70, 20, "", is_inference=True, P_i=(70,))
GROWING = tokens("growing", 70, 150, "", is_inference=True, attributes={"scale": 30.0})
FOUR = r"\{(.*?), (.*?), (.*?), (.*?)\}"
MMA = rf"^(mma\S+) {FOUR}, {FOUR}, \{{(.*?), (.*?)\}}, {FOUR};"
MATRICES = (
    r"^(ldmatrix\.sync\.aligned\.m8n8\.x4)(\.trans|)(\.shared\.b16 \{.*?\}), \[(%\w+) \+ (\d+)\];"
)
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
    wrong("ldmatrix transposed", MATRICES.replace("(\\.trans|)", "()"), r"\1.trans\3, [\4 + \5];"),
    wrong(
        "ldmatrix not transposed",
        MATRICES.replace("(\\.trans|)", "(\\.trans)"),
        r"\1\3, [\4 + \5];",
    ),
    wrong(
        "ldmatrix of the row's next elements",
        MATRICES,
        r"{ .reg .b32 %mutant; add.s32 %mutant, \4, 16; \1\2\3, [%mutant + \5]; }",
        "nobody has written",
    ),
    wrong(
        "ldmatrix off its border",
        MATRICES,
        r"{ .reg .b32 %mutant; add.s32 %mutant, \4, 8; \1\2\3, [%mutant + \5]; }",
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
    Mutant(
        "prefix_attention st.shared with words exchanged",
        "prefix_attention_fwd_sm80<Config<bf16, 32>>",
        SHARED_TILES + "store_shared_16(to, narrow<T>",
        r"^st\.shared\.v4\.u32 \[(.*?)\], \{(.*?), (.*?), (.*?)\};",
        r"st.shared.v4.u32 [\1], {\3, \2, \4};",
        LONG_PREFIX,
        WRONG,
        "bfloat16-master",
    ),
    wrong(
        "ex2 of twice the number",
        r"^ex2\.approx\.ftz\.f32 (%f\d+), (%f\d+);",
        r"{ .reg .f32 %mutant; add.f32 %mutant, \2, \2; ex2.approx.ftz.f32 \1, %mutant; }",
    ),
    wrong(
        "rcp of twice the number",
        r"^rcp\.approx\.ftz\.f32 (%f\d+), (%f\d+);",
        r"{ .reg .f32 %mutant; add.f32 %mutant, \2, \2; rcp.approx.ftz.f32 \1, %mutant; }",
    ),
    wrong(
        "lg2 of twice the number",
        r"^lg2\.approx\.ftz\.f32 (%f\d+), (%f\d+);",
        r"{ .reg .f32 %mutant; add.f32 %mutant, \2, \2; lg2.approx.ftz.f32 \1, %mutant; }",
    ),
    wrong(
        "maximum over the wrong lanes",
        r"(shfl\.sync\.bfly\.b32 %r\d+\|%p\d+, %r\d+), [%\w]+",
        r"\1, 4",
        WRONG,
        FORWARD + "maximum = fmaxf(maximum, shfl_xor(maximum, 2))",
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
