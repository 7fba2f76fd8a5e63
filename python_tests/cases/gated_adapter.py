"""What gated_adapter is tested on."""

from __future__ import annotations

from . import Case, around_one, uniform

DRAWS = {"gate": uniform, "pre_norm_weight": around_one, "post_norm_weight": around_one}

UNIPELT = "b_down, b_up, gate_weight, gate_bias, mask, residual"
BANKS = "bank w_down, bank b_down, bank w_up, bank b_up, down_index per sample, up_index per sample"
PRE_NORM = "pre_norm_weight, pre_norm_bias"
NORMS = f"{PRE_NORM}, post_norm_weight, post_norm_bias"
PRE_NORMS = "bank pre_norm_weight, bank pre_norm_bias"
NORM_BANKS = f"{PRE_NORMS}, bank post_norm_weight, bank post_norm_bias"
# Which index picks a bank's member.
INDEX_OF = {
    **dict.fromkeys(("w_down", "b_down", "pre_norm_weight", "pre_norm_bias"), "down_index"),
    **dict.fromkeys(("w_up", "b_up", "post_norm_weight", "post_norm_bias"), "up_index"),
}
EVERYTHING = f"{BANKS}, {NORMS}, scale, gate_weight, gate_bias, mask, residual"
POOLED = {"pooling": "masked_mean", "residual_from": "tensor"}
_SMALL = {"B": 2, "S": 17, "D": 64, "R": 12}

CASES = [
    Case("plain", {"B": 2, "S": 8, "D": 32, "R": 8}, is_quick=True),
    Case("unipelt", {"B": 2, "S": 17, "D": 128, "R": 48}, UNIPELT, POOLED, is_quick=True),
    Case(
        "unipelt_mean", {"B": 3, "S": 13, "D": 64, "R": 16}, UNIPELT, {**POOLED, "pooling": "mean"}
    ),
    Case("unipelt_minilm", {"B": 4, "S": 33, "D": 384, "R": 24}, UNIPELT, POOLED),
    Case("unipelt_bert", {"B": 1, "S": 65, "D": 768, "R": 48}, UNIPELT, POOLED),
    Case("token_gate", _SMALL, "b_down, b_up, gate_weight, gate_bias", {"pooling": "token"}),
    Case("masked_sentence", _SMALL, UNIPELT, POOLED, {"mask": 0}),
    Case("gate_per_sample", _SMALL, "b_down, b_up, gate"),
    Case("gate_per_row", _SMALL, "b_down, b_up, gate per row"),
    Case("gate_zero", _SMALL, "b_down, b_up, gate", fill={"gate": 0.0}),
    Case("gate_one", _SMALL, "b_down, b_up, gate", fill={"gate": 1.0}),
    Case("learned_scale", _SMALL, "b_down, b_up, scale, gate"),
    Case("scale_value", _SMALL, "b_up", {"scale_value": 2.5, "activation": "silu"}),
    Case(
        "adamix",
        {**_SMALL, "M": 4},
        "bank w_down, bank b_down, b_up, down_index",
        {"activation": "gelu"},
        is_quick=True,
    ),
    Case(
        "adamix_both",
        {**_SMALL, "M": 4, "M_up": 3},
        "bank w_down, bank b_down, bank w_up, bank b_up, down_index, up_index",
    ),
    Case(
        "bank_per_sample",
        {"B": 5, "S": 9, "D": 64, "R": 16, "M": 3, "M_up": 3},
        BANKS,
        {"activation": "gelu_tanh"},
        is_quick=True,
    ),
    Case("bank_of_one", {**_SMALL, "M": 1, "M_up": 1}, "bank w_down, bank w_up"),
    Case("vlm", _SMALL, f"b_down, b_up, {PRE_NORM}", is_quick=True),
    Case(
        "hyperpelt",
        _SMALL,
        "b_down, b_up, post_norm_weight, post_norm_bias, scale",
        {"activation": "gelu"},
        is_quick=True,
    ),
    Case(
        "everything",
        {"B": 3, "S": 11, "D": 72, "R": 20, "M": 2, "M_up": 2},
        EVERYTHING,
        {**POOLED, "activation": "tanh", "dropout_p": 0.2, "scale_value": 0.5},
    ),
    # A norm for each task, and a batch that mixes tasks or has one.
    Case(
        "vlm_mixed_tasks",
        {"B": 4, "S": 9, "D": 64, "R": 12, "M": 3, "M_up": 3},
        f"{BANKS}, {PRE_NORMS}",
        {"activation": "silu"},
        is_quick=True,
    ),
    Case(
        "hyperpelt_mixed_tasks",
        {"B": 4, "S": 9, "D": 64, "R": 12, "M_up": 3},
        "b_down, bank w_up, bank b_up, up_index per sample, bank post_norm_weight,"
        " bank post_norm_bias, scale",
        {"activation": "gelu"},
        is_quick=True,
    ),
    Case(
        "norm_banks",
        {"B": 3, "S": 7, "D": 64, "R": 20, "M": 2, "M_up": 4},
        f"{BANKS}, {NORM_BANKS}, scale, gate_weight, gate_bias, mask, residual",
        {**POOLED, "activation": "tanh", "scale_value": 0.5},
    ),
    Case(
        "norm_banks_one_task",
        {"B": 2, "S": 33, "D": 128, "R": 24, "M": 3, "M_up": 2},
        "bank w_down, bank b_down, bank w_up, bank b_up, down_index, up_index,"
        f" {NORM_BANKS}, gate_weight, gate_bias",
        {"pooling": "token", "activation": "silu"},
    ),
    Case(
        "norm_bank_of_one",
        {**_SMALL, "M": 1, "M_up": 1},
        f"bank w_down, bank w_up, {NORM_BANKS}, residual",
        {"residual_from": "tensor", "activation": "identity"},
    ),
    Case("identity", _SMALL, "b_down", {"activation": "identity", "residual_from": "none"}),
    Case(
        "no_residual",
        _SMALL,
        "b_down, b_up, gate_weight, gate_bias, mask",
        {**POOLED, "residual_from": "none"},
    ),
    Case("dropout", _SMALL, "b_down, b_up, gate", {"dropout_p": 0.3}, is_quick=True),
    Case("skip_rows", _SMALL, "b_down, b_up, gate per row", {"skip_below": 0.5}, is_inference=True),
    Case(
        "skip_sentences",
        {**_SMALL, "B": 6},
        "b_down, b_up, gate",
        {"skip_below": 0.5},
        is_inference=True,
    ),
    # Widths of whole chunks and ranks of whole vectors have kernels of their own.
    Case(
        "dropout_rank_64",
        {"B": 2, "S": 40, "D": 128, "R": 64},
        "b_down, b_up, gate",
        {"dropout_p": 0.3, "activation": "gelu"},
    ),
    Case(
        "token_gate_rank_40",
        {"B": 2, "S": 33, "D": 192, "R": 40},
        "b_down, b_up, gate_weight, gate_bias",
        {"pooling": "token", "residual_from": "none", "dropout_p": 0.1},
    ),
    Case(
        "gate_per_row_rank_32",
        {"B": 3, "S": 50, "D": 64, "R": 32},
        "b_up, scale, gate per row, residual",
        {"activation": "silu", "residual_from": "tensor"},
    ),
    Case("no_bias_rank_96", {"B": 1, "S": 70, "D": 128, "R": 96}, "scale"),
    Case("one_row", {"B": 1, "S": 1, "D": 64, "R": 16}, UNIPELT, POOLED),
    Case("no_rows", {"B": 0, "S": 5, "D": 64, "R": 16}, "b_down, b_up"),
    Case("rank_1", {"B": 2, "S": 31, "D": 64, "R": 1}, "b_down, b_up"),
    Case("rank_odd", {"B": 2, "S": 31, "D": 64, "R": 17}, "b_down, b_up"),
    Case("rank_128", {"B": 1, "S": 63, "D": 128, "R": 128}, "b_down, b_up"),
    Case(
        "vlm_rank_300",
        {"B": 2, "S": 11, "D": 64, "R": 300, "M": 2, "M_up": 2},
        f"{BANKS}, {PRE_NORMS}",
        {"activation": "gelu_tanh"},
    ),
    Case(
        "norm_banks_rank_300",
        {"B": 2, "S": 5, "D": 64, "R": 300, "M": 2, "M_up": 2},
        f"{BANKS}, {NORM_BANKS}, scale, gate_weight, gate_bias, mask, residual",
        {**POOLED, "activation": "gelu"},
    ),
    Case("rank_512", {"B": 1, "S": 16, "D": 64, "R": 512}, "b_down, b_up"),
    Case("rows_64", {"B": 1, "S": 64, "D": 64, "R": 16}, "b_down, b_up"),
    Case("rows_65", {"B": 1, "S": 65, "D": 64, "R": 16}, "b_down, b_up"),
    Case(
        "rows_prime", {"B": 1, "S": 127, "D": 96, "R": 24}, "b_down, b_up", {"activation": "silu"}
    ),
    Case(
        "width_odd",
        {"B": 2, "S": 7, "D": 37, "R": 5},
        "b_down, b_up, gate_weight, gate_bias",
        {"pooling": "mean"},
    ),
    Case("offset_view", _SMALL, UNIPELT, POOLED, layout="offset"),
    Case("strided_view", _SMALL, UNIPELT, POOLED, layout="strided"),
    Case("transposed_view", _SMALL, UNIPELT, POOLED, layout="transposed"),
]
