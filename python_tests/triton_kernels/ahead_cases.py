"""The calls for which Triton's kernels are compiled ahead: for each operator a case by name.

Names end with the dtype of activations; parameters are float32 masters beside 16 bits.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from cases import Case
from cases.gated_adapter import BANKS, EVERYTHING, POOLED, PRE_NORMS, UNIPELT
from cases.lora_linear import GATE, GATES
from cases.prefix_attention import TABLE_AND_SHARED

_BERT = {"B": 16, "S": 128, "D": 768, "R": 48}
_GATED_ADAPTER = {
    "unipelt-bf16": (torch.bfloat16, Case("", _BERT, UNIPELT, POOLED)),
    "unipelt-f16": (torch.float16, Case("", _BERT, UNIPELT, POOLED)),
    "plain-f32": (torch.float32, Case("", _BERT, "b_down, b_up", {"activation": "gelu"})),
    "rank_128-bf16": (torch.bfloat16, Case("", {**_BERT, "R": 128}, "b_down, b_up, gate per row")),
    "rank_256-bf16": (torch.bfloat16, Case("", {**_BERT, "R": 256}, "b_down, b_up")),
    "rank_256-f32": (torch.float32, Case("", {**_BERT, "R": 256}, "b_down, b_up")),
    "vlm_rank_300-bf16": (
        torch.bfloat16,
        Case("", {**_BERT, "R": 300, "M": 4, "M_up": 4}, f"{BANKS}, {PRE_NORMS}"),
    ),
    "rank_300-f32": (torch.float32, Case("", {**_BERT, "R": 300}, "b_down, b_up")),
    "token-bf16": (
        torch.bfloat16,
        Case("", _BERT, "b_up, gate_weight, gate_bias", {"pooling": "token", "activation": "silu"}),
    ),
    "everything-bf16": (
        torch.bfloat16,
        Case(
            "",
            {**_BERT, "D": 1000, "R": 20, "M": 4, "M_up": 3},
            EVERYTHING,
            {**POOLED, "activation": "gelu_tanh", "dropout_p": 0.1},
        ),
    ),
    "one_row-f16": (
        torch.float16,
        Case("", {"B": 1, "S": 1, "D": 64, "R": 1, "M": 1, "M_up": 1}, EVERYTHING, POOLED),
    ),
    "skip-bf16": (
        torch.bfloat16,
        Case("", _BERT, UNIPELT, {**POOLED, "skip_below": 0.5, "activation": "tanh"}),
    ),
}

_LORA = {"B": 16, "S": 128, "Din": 768, "Dout": 768, "R_i": (8,), "size_i": (768,)}
_ONE_BRANCH = {"offsets": [0], "scales": [2.0], "poolings": ["none"]}
_LORA_LINEAR = {
    "plain-f32": (torch.float32, Case("", _LORA, "bias", _ONE_BRANCH)),
    "plain-bf16": (torch.bfloat16, Case("", _LORA, "bias", _ONE_BRANCH)),
    "rank_64-bf16": (torch.bfloat16, Case("", {**_LORA, "R_i": (64,)}, "bias", _ONE_BRANCH)),
    "rank_128-bf16": (torch.bfloat16, Case("", {**_LORA, "R_i": (128,)}, "bias", _ONE_BRANCH)),
    "rank_256-bf16": (torch.bfloat16, Case("", {**_LORA, "R_i": (256,)}, "bias", _ONE_BRANCH)),
    "unipelt_query-bf16": (
        torch.bfloat16,
        Case(
            "",
            _LORA,
            GATES,
            {**_ONE_BRANCH, "poolings": ["masked_mean"], "extra_poolings": ["masked_mean"]},
        ),
    ),
    "everything-bf16": (
        torch.bfloat16,
        Case(
            "",
            {
                "B": 16,
                "S": 128,
                "Din": 1000,
                "Dout": 1500,
                "R_i": (8, 20, 4, 1),
                "size_i": (500, 100, 300, 1500),
                "M_i": (3, 4, None, None),
                "N_i": (2, 4, None, None),
            },
            "bias, transposed weight, bank a[0], bank a[1], bank b[0], bank b[1], "
            "a_index[0] per sample, a_index[1], b_index[0] per sample, b_index[1], "
            "gate[0], gate[2] per row, gate_weight[1], gate_weight[3], gate_bias[1], gate_bias[3], "
            "2 extra_weight, 2 extra_bias, mask",
            {
                "transposed": True,
                "offsets": [0, 400, 1200, 0],
                "dropout_p": 0.1,
                "scales": [1.0, 0.5, 2.0, 1.0],
                "poolings": ["none", "token", "none", "mean"],
                "extra_poolings": ["masked_mean", "token"],
            },
        ),
    ),
    "one_row-f16": (
        torch.float16,
        Case(
            "",
            {"B": 1, "S": 1, "Din": 64, "Dout": 64, "R_i": (1,), "size_i": (1,)},
            "bias",
            _ONE_BRANCH,
        ),
    ),
    "fused_qkv-bf16": (
        torch.bfloat16,
        Case(
            "",
            {**_LORA, "Dout": 2304, "R_i": (8, 8), "size_i": (768, 768)},
            f"bias, {GATE}, mask",
            {"offsets": [0, 1536], "scales": [1.0, 1.0], "poolings": ["masked_mean"] * 2},
        ),
    ),
    "extra_gates_only-f16": (
        torch.float16,
        Case(
            "",
            {"B": 16, "S": 128, "Din": 768, "Dout": 768},
            "bias, extra_weight, extra_bias",
            {"extra_poolings": ["mean"]},
        ),
    ),
}

_ATTENTION = {"B": 16, "H": 12, "G": 12, "S": 128, "N": 128, "E": 64, "P_i": (30,)}
_LONG = {**_ATTENTION, "B": 2, "S": 2048, "N": 2048}
_PREFIX_ATTENTION = {
    "plain-f32": (torch.float32, Case("", _ATTENTION, "gate, key_mask, bias shared by samples")),
    "unipelt-bf16": (torch.bfloat16, Case("", _ATTENTION, "gate, key_mask")),
    "unipelt_long-bf16": (torch.bfloat16, Case("", _LONG, "gate, key_mask")),
    "minilm-bf16": (
        torch.bfloat16,
        Case("", {**_ATTENTION, "E": 32, "P_i": (10,)}, "gate, key_mask"),
    ),
    "t5-bf16": (
        torch.bfloat16,
        Case("", _LONG, "bias shared by samples, key_mask", {"scale": 1.0}),
    ),
    "causal_128-bf16": (
        torch.bfloat16,
        Case("", {**_LONG, "G": 4, "E": 128}, "", {"is_causal": True}),
    ),
    "head_128-f32": (torch.float32, Case("", {**_ATTENTION, "E": 128}, "gate")),
    "dropout-bf16": (
        torch.bfloat16,
        Case("", _LONG, "gate, key_mask", {"dropout_p": 0.1}),
    ),
    "everything-bf16": (
        torch.bfloat16,
        Case(
            "",
            {**_LONG, "G": 4, "E": 80, "P_i": (3, 30), "A_i": (4, None)},
            f"{TABLE_AND_SHARED}, gate per head, lengths, bias shared by heads",
            {"is_causal": True, "dropout_p": 0.1},
        ),
    ),
    "one_row-f16": (
        torch.float16,
        Case("", {**_ATTENTION, "B": 1, "S": 1, "P_i": (1,)}, "", {"is_causal": True}),
    ),
}

CASES = {
    "gated_adapter": _GATED_ADAPTER,
    "lora_linear": _LORA_LINEAR,
    "prefix_attention": _PREFIX_ATTENTION,
}


def in_another_batch(case: Case) -> Case:
    """The same call with other numbers of samples and rows, which must not compile again."""
    rows = {letter: 253 for letter in ("S", "N") if letter in case.sizes}
    return replace(case, sizes={**case.sizes, **rows, "B": 13})


for _operator, _like in (
    ("gated_adapter", "unipelt-bf16"),
    ("lora_linear", "unipelt_query-bf16"),
    ("prefix_attention", "unipelt_long-bf16"),
):
    _dtype, _case = CASES[_operator][_like]
    CASES[_operator]["other_batch-bf16"] = (_dtype, in_another_batch(_case))
