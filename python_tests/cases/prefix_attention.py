"""What prefix_attention is tested on."""

from __future__ import annotations

from typing import Any

from . import Case, uniform

DRAWS = {"gate": uniform}

UNIPELT = "gate, key_mask"
TABLE_AND_SHARED = "bank prefix_k[0], bank prefix_v[0], prefix_index[0]"
_NO_PREFIX = {"B": 2, "H": 4, "G": 4, "S": 17, "N": 17, "E": 32}
_SIZES = {**_NO_PREFIX, "P_i": (10,)}
_TABLE = {"B": 3, "H": 2, "G": 2, "S": 9, "N": 11, "E": 32, "P_i": (3, 5), "A_i": (4, None)}


def scaled(id: str, sizes: dict[str, Any], inputs: str = "", **more: Any) -> Case:
    """A case with the usual scale 1 / sqrt(E), and a prefix for each length of the sizes."""
    attributes = {"scale": sizes["E"] ** -0.5, **more.pop("attributes", {})}
    return Case(id, sizes, inputs, attributes, **more)


CASES = [
    scaled("no_prefix", _NO_PREFIX),
    scaled("prefix", _SIZES, is_quick=True),
    scaled("unipelt", _SIZES, UNIPELT, is_quick=True),
    scaled("unipelt_minilm", {**_SIZES, "H": 12, "G": 12, "S": 33, "N": 33}, UNIPELT),
    scaled("unipelt_bert", {**_SIZES, "B": 1, "E": 64, "S": 65, "N": 65}, UNIPELT),
    scaled("gate_per_head", _SIZES, "gate per head"),
    scaled("gate_zero", _SIZES, "gate", fill={"gate": 0.0}),
    scaled("gate_one", _SIZES, "gate", fill={"gate": 1.0}),
    scaled("lengths", _SIZES, "gate, lengths"),
    scaled("causal", {**_SIZES, "S": 13, "N": 19}, attributes={"is_causal": True}, is_quick=True),
    scaled(
        "causal_grouped",
        {**_SIZES, "G": 2, "S": 75, "N": 75, "E": 64},
        "gate per head",
        attributes={"is_causal": True},
    ),
    scaled(
        "causal_blocks",  # of columns, of which the queries see parts
        {**_SIZES, "H": 1, "G": 1, "S": 150, "N": 150, "E": 128},
        UNIPELT,
        attributes={"is_causal": True},
    ),
    scaled("causal_more_queries", {**_NO_PREFIX, "S": 9, "N": 5}, attributes={"is_causal": True}),
    scaled("control_prefixes", _TABLE, f"{TABLE_AND_SHARED}, gate, key_mask", is_quick=True),
    scaled("tables", {**_TABLE, "S": 40, "N": 40, "E": 96}, f"{TABLE_AND_SHARED}, gate"),
    scaled("two_segments", {**_SIZES, "P_i": (4, 6)}),
    scaled("grouped_query", {**_SIZES, "H": 6, "G": 2}, UNIPELT, is_quick=True),
    scaled(
        "t5",
        _SIZES,
        "bias shared by samples, key_mask",
        attributes={"scale": 1.0},
        is_quick=True,
    ),
    scaled("bias_per_sample", _SIZES, "bias", attributes={"is_causal": True}),
    scaled("bias_shared", {**_SIZES, "B": 3}, "bias shared by all"),
    scaled("dropout", _SIZES, UNIPELT, attributes={"dropout_p": 0.1}, is_quick=True),
    scaled("decode", {**_SIZES, "S": 1, "N": 40}, attributes={"is_causal": True}),
    scaled("only_prefix", {**_SIZES, "N": 0}, "gate"),
    scaled("all_masked", _NO_PREFIX, "key_mask", fill={"key_mask": 0}),
    scaled("all_masked_with_prefix", _SIZES, "key_mask", fill={"key_mask": 0}),
    scaled("empty_prefix", {**_SIZES, "P_i": (0,)}),
    scaled("prefix_1", {**_SIZES, "P_i": (1,)}),
    scaled("prefix_67", {**_SIZES, "P_i": (67,)}),
    scaled("head_96", {**_SIZES, "E": 96, "H": 2, "G": 2}),
    scaled("head_128", {**_SIZES, "E": 128, "H": 2, "G": 2}),
    scaled("head_odd", {**_SIZES, "E": 20}),
    scaled("length_128", {**_SIZES, "B": 1, "S": 128, "N": 128}),
    scaled("length_129", {**_SIZES, "B": 1, "H": 2, "G": 2, "S": 129, "N": 131}),
    scaled("no_rows", {**_SIZES, "B": 0}),
    scaled("offset_view", _SIZES, UNIPELT, layout="offset"),
    scaled("transposed_view", _SIZES, layout="transposed"),
]
