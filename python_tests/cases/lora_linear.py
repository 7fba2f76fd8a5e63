"""What lora_linear is tested on."""

from __future__ import annotations

from typing import Any

from . import Case, uniform

DRAWS = {"gate": uniform}

GATE = "gate_weight, gate_bias"
GATES = f"bias, {GATE}, extra_weight, extra_bias, mask"
BANKS = "bias, bank a, bank b, a_index per sample, b_index per sample"


def branches(*ranks: int, d_in: int, size: int, **more: Any) -> dict[str, Any]:
    """Sizes of a square layer with branches of these ranks over ``size`` columns each."""
    sizes = {"B": 2, "S": 13, "Din": d_in, "Dout": d_in, "R_i": ranks}
    return {**sizes, "size_i": (size,) * len(ranks), **more}


def branched(id: str, sizes: dict[str, Any], inputs: str, scales: list[float], **more: Any) -> Case:
    """A case with a branch for each of the scales."""
    n = len(scales)
    attributes = {"offsets": [0] * n, "scales": scales, "poolings": ["none"] * n}
    return Case(id, sizes, inputs, {**attributes, **more.pop("attributes", {})}, **more)


_GATED = {"poolings": ["masked_mean"]}
_ONE = branches(8, d_in=64, size=64)

CASES = [
    branched("no_branch", {"B": 2, "S": 5, "Din": 32, "Dout": 48}, "bias", []),
    branched("lora", _ONE, "bias", [2.0], is_quick=True),
    branched("lora_no_bias", branches(3, d_in=32, size=32), "", [0.5]),
    branched("unipelt", _ONE, f"bias, {GATE}, mask", [1.0], attributes=_GATED, is_quick=True),
    branched(
        "unipelt_query",
        branches(8, d_in=96, size=96),
        GATES,
        [1.0],
        attributes={**_GATED, "extra_poolings": ["masked_mean"]},
        is_quick=True,
    ),
    branched(
        "extra_gates_only",
        {"B": 3, "S": 7, "Din": 40, "Dout": 24},
        "bias, 2 extra_weight, 2 extra_bias",
        [],
        attributes={"extra_poolings": ["mean", "token"]},
    ),
    branched(
        "fused_qkv",
        {**branches(4, 4, d_in=48, size=48), "Dout": 144},
        f"bias, {GATE}, mask",
        [1.0, 1.0],
        attributes={"offsets": [0, 96], "poolings": ["masked_mean", "mean"]},
        is_quick=True,
    ),
    branched(
        "conv1d",
        {**branches(4, d_in=48, size=48), "Dout": 144},
        "bias, transposed weight",
        [8.0],
        attributes={"transposed": True},
    ),
    branched("overlapping", branches(4, 6, d_in=32, size=32), "bias", [1.0, 0.5]),
    branched("gate_per_sample", _ONE, "bias, gate", [2.0]),
    branched("gate_per_row", _ONE, "bias, gate per row", [2.0]),
    branched("gate_zero", _ONE, "bias, gate", [2.0], fill={"gate": 0.0}),
    branched("token_gate", _ONE, f"bias, {GATE}", [2.0], attributes={"poolings": ["token"]}),
    branched("adamix", {**_ONE, "M_i": (4,)}, "bias, bank a, a_index", [8.0]),
    branched(
        "bank_per_sample", {**_ONE, "B": 4, "M_i": (3,), "N_i": (2,)}, BANKS, [1.0], is_quick=True
    ),
    branched("b_zero", _ONE, "bias", [2.0], fill={"b": 0.0}),
    branched("dropout", _ONE, "bias, gate", [2.0], attributes={"dropout_p": 0.25}, is_quick=True),
    branched("rank_1", branches(1, d_in=64, size=64), "bias", [1.0]),
    branched("rank_17", branches(17, d_in=64, size=64), "bias", [1.0]),
    branched("rank_64", branches(64, d_in=64, size=64), "bias", [1.0]),
    branched("rank_256", branches(256, d_in=64, size=64), "bias", [1.0]),
    branched("rows_129", branches(16, d_in=128, size=128, B=1, S=129), "bias", [1.0]),
    branched(
        "width_odd",
        {**branches(5, d_in=37, size=11), "Dout": 29},
        "bias",
        [1.0],
        attributes={"offsets": [18]},
    ),
    branched("no_rows", {**_ONE, "B": 0}, "bias", [2.0]),
    branched("offset_view", _ONE, "bias", [2.0], layout="offset"),
    branched("strided_view", _ONE, "bias", [2.0], layout="strided"),
    branched("transposed_view", _ONE, "bias", [2.0], layout="transposed"),
]
