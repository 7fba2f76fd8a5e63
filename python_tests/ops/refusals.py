"""What backends refuse of the cases in python_tests/cases: nothing but this."""

from __future__ import annotations

from typing import NamedTuple

from cases import Case


class Refusal(NamedTuple):
    """The cases and precisions, with spaces between them, that are refused in a sentence with these
    words; all of them where none are named. ``float16`` is ``float16-master`` too.
    """

    words: str
    precisions: str = ""
    cases: str = ""

    def covers(self, case: Case, precision: str) -> bool:
        is_precision = precision.removesuffix("-master") in self.precisions.split()
        is_case = case.id in self.cases.split()
        return (is_precision or not self.precisions) and (is_case or not self.cases)


_16_BITS = Refusal("its matrix products take float16 or bfloat16", "float32")
_NOT_FLOAT16 = Refusal("it takes float32 or bfloat16", "float16")
_TILES = (_NOT_FLOAT16, Refusal("its tiles multiply bfloat16", "float32"))
_ROWS = Refusal("read 16 bytes at a time", cases="width_odd")
_HEADS = Refusal("head size 20 is not one of 32, 64, 96, 128", cases="head_odd")

# By operator and backend, of one form or of all; cuda_sim refuses what cuda does, cpu_sim what cpu.
# What stands first is said first.
REFUSALS: dict[str, dict[str, tuple[Refusal, ...]]] = {
    "gated_adapter": {
        "cuda": (_16_BITS, _ROWS),
        "cpu": (_NOT_FLOAT16,),
        "cpu:amx": _TILES,
    },
    "prefix_attention": {
        "cuda:single": (_16_BITS, _HEADS),
        "cuda:composed": (
            _16_BITS,
            _HEADS,
            Refusal(
                "there is no prefix to merge",
                cases="no_prefix causal_more_queries all_masked empty_prefix",
            ),
            Refusal(
                "no mask, and the call has a key mask",
                cases="unipelt unipelt_minilm unipelt_bert control_prefixes grouped_query dropout"
                " all_masked_with_prefix offset_view causal_blocks",
            ),
            Refusal("no mask, and the call has lengths", cases="lengths"),
            Refusal(
                "no mask, and the call has an additive bias",
                cases="t5 bias_per_sample bias_shared",
            ),
            Refusal("aligns a causal mask for S = N only", cases="causal"),
            Refusal("no own keys", cases="only_prefix"),
        ),
        "cpu": (_NOT_FLOAT16,),
        "cpu:amx": _TILES,
    },
    "lora_linear": {
        "cuda:single": (
            _16_BITS,
            _ROWS,
            Refusal("a pooled gate", cases="unipelt unipelt_query extra_gates_only fused_qkv"),
            Refusal("a block has room for 64 ranks", cases="rank_256"),
        ),
        "cuda:composed": (_16_BITS, _ROWS),
        "cpu": (_NOT_FLOAT16, Refusal("beyond 192 ranks in all", "float32", "rank_256")),
        "cpu:amx": _TILES,
    },
    "masked_weight": {"cpu": (_NOT_FLOAT16,)},
    "symmetric_kl": {"cpu": (_NOT_FLOAT16,)},
}


def declared(operator: str, request: str, case: Case, precision: str) -> str:
    """Words of the sentence in which a case is refused; empty where it has to be served."""
    backend, _, form = request.replace("_sim", "").partition(":")
    table = REFUSALS[operator]
    refusals = table.get(f"{backend}:{form}", table.get(backend, ()))
    return next((found.words for found in refusals if found.covers(case, precision)), "")
