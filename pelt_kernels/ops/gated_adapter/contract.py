"""gated_adapter: what it takes and gives, its formula in plain PyTorch, and the cases it is tested
on.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._bank import check_bank, member
from .._cases import Case, around_one, uniform
from .._contract import Call, Contract, Value
from .._gate import accumulator, check_pooling, learned_gate, over_rows
from .._philox import dropout_factor
from .._product import linear

ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda h: torch.nn.functional.gelu(h, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
    "identity": lambda h: h,
}
NEVER_SKIP = -math.inf


def rules(call: Call, values: dict[str, Value]) -> None:
    """What shapes cannot say: which inputs go together."""
    name, given, attributes = call.contract.name, call.given, call.attributes
    for norm in ("pre_norm", "post_norm"):
        if (f"{norm}_weight" in given) != (f"{norm}_bias" in given):
            raise ValueError(
                f"{name}: expected {norm} with weight and bias, got only one of the two"
            )
    if ("gate_weight" in given) != ("gate_bias" in given):
        raise ValueError(
            f"{name}: expected a learned gate with weight [D] and bias [1], got only one of the two"
        )
    if "gate_weight" in given:
        if "gate" in given:
            raise ValueError(
                f"{name}: expected a gate tensor or a learned gate, got both; leave one out"
            )
        check_pooling(name, attributes["pooling"], values["mask"])
    check_bank(name, "w_down", call.sizes.get("M", 1), "down_index", "down_index" in given)
    check_bank(name, "w_up", call.sizes.get("M_up", 1), "up_index", "up_index" in given)
    for bias, weight, rank in (("b_down", "w_down", 3), ("b_up", "w_up", 3)):
        if bias in given and (values[bias].ndim == 2) != (values[weight].ndim == rank):
            raise ValueError(
                f"{name}: expected {bias} and {weight} both as banks or both as single, got {bias} "
                f"{list(values[bias].shape)} and {weight} {list(values[weight].shape)}"
            )
    if "residual" in given and attributes["residual_from"] != "tensor":
        raise ValueError(
            f"{name}: expected residual_from 'tensor' beside a residual, got"
            f" {attributes['residual_from']!r}"
        )


def output_shapes(call: Call) -> dict[str, Any]:
    """The shapes of the outputs of a call."""
    b, s, d, r = (call.sizes[letter] for letter in "BSDR")
    gate: tuple[int, ...] = (0,)
    if "gate_weight" in call.given:
        gate = (b, s) if call.attributes["pooling"] == "token" else (b,)
    return {"y": (b, s, d), "gate_value": gate, "h": (b, s, r)}


CONTRACT = Contract(
    name="gated_adapter",
    inputs="""
        x                activation    [B, S, D]
        w_down           parameter     [R, D] | [M, R, D]
        b_down           parameter?    [R] | [M, R]
        w_up             parameter     [D, R] | [M_up, D, R]
        b_up             parameter?    [D] | [M_up, D]
        down_index       index(M)?     [] | [B]
        up_index         index(M_up)?  [] | [B]
        pre_norm_weight  parameter?    [D]
        pre_norm_bias    parameter?    [D]
        post_norm_weight parameter?    [D]
        post_norm_bias   parameter?    [D]
        scale            parameter?    []
        gate             parameter?    [B] | [B, S]
        gate_weight      parameter?    [D]
        gate_bias        parameter?    [1]
        mask             bool?         [B, S]
        residual         activation?   [B, S, D]  grad=dy
    """,
    attributes="""
        activation    str = relu      relu | gelu | gelu_tanh | silu | tanh | identity
        pooling       str = none      none | token | mean | masked_mean
        residual_from str = input     input | none | tensor
        scale_value   float = 1.0     (-inf, inf)
        pre_norm_eps  float = 1e-5    [0, inf)
        post_norm_eps float = 1e-5    [0, inf)
        dropout_p     float = 0.0     [0, 1)
        skip_below    float = -inf    [-inf, inf]
    """,
    outputs="""
        y           activation  differentiable
        gate_value  float32     saved
        h           activation  saved private
    """,
    has_seed=True,
    rules=rules,
    output_shapes=output_shapes,
    never_zero="D M M_up",
)

DRAWS = {"gate": uniform, "pre_norm_weight": around_one, "post_norm_weight": around_one}


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension, statistics in the accumulator dtype."""
    return torch.nn.functional.layer_norm(
        x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps
    )


def reference(
    x: Tensor,
    w_down: Tensor,
    b_down: Tensor | None,
    w_up: Tensor,
    b_up: Tensor | None,
    down_index: Tensor | None,
    up_index: Tensor | None,
    pre_norm_weight: Tensor | None,
    pre_norm_bias: Tensor | None,
    post_norm_weight: Tensor | None,
    post_norm_bias: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    mask: Tensor | None,
    residual: Tensor | None,
    *,
    activation: str,
    pooling: str,
    residual_from: str,
    scale_value: float,
    pre_norm_eps: float,
    post_norm_eps: float,
    dropout_p: float,
    seed: int,
    skip_below: float,
) -> tuple[Tensor, Tensor]:
    """y and the learned gate's value, by the formula, differentiable by autograd: the truth that
    backends are held to.
    """
    acc = accumulator(x.dtype)
    z = x
    if pre_norm_weight is not None and pre_norm_bias is not None:
        z = layer_norm(x, pre_norm_weight, pre_norm_bias, pre_norm_eps)
    h = linear(z, member(w_down, down_index, 2), member(b_down, down_index, 1))
    u = linear(ACTIVATIONS[activation](h), member(w_up, up_index, 2), member(b_up, up_index, 1))
    if post_norm_weight is not None and post_norm_bias is not None:
        u = layer_norm(u, post_norm_weight, post_norm_bias, post_norm_eps)
    if dropout_p:
        u = u * dropout_factor(u.shape[0] * u.shape[1], u.shape[2], dropout_p, seed, u).view_as(u)
    factor = torch.full((1, 1, 1), scale_value, dtype=acc, device=x.device)
    if scale is not None:
        factor = factor * scale.to(acc)
    gate_value = x.new_empty(0, dtype=acc)
    if gate_weight is not None and gate_bias is not None:
        gate = gate_value = learned_gate(x, gate_weight, gate_bias, pooling, mask)
    if gate is not None:
        factor = factor * over_rows(gate).to(acc)
        if skip_below > NEVER_SKIP:
            u = u.masked_fill(over_rows(gate) < skip_below, 0.0)
    y = (factor * u).to(x.dtype)
    if residual_from == "input":
        y = y + x
    elif residual is not None:
        y = y + residual
    return y, gate_value


_UNIPELT = "b_down b_up gate_weight gate_bias mask residual"
_TENSOR = {"residual_from": "tensor"}
_MASKED = {"pooling": "masked_mean"}
_SMALL = {"B": 2, "S": 17, "D": 64, "R": 12}

CASES = [
    Case("plain", {"B": 2, "S": 8, "D": 32, "R": 8}, is_quick=True),
    Case(
        "unipelt",
        {"B": 2, "S": 17, "D": 128, "R": 48},
        _UNIPELT,
        {**_MASKED, **_TENSOR},
        is_quick=True,
    ),
    Case(
        "unipelt_mean",
        {"B": 3, "S": 13, "D": 64, "R": 16},
        _UNIPELT,
        {"pooling": "mean", **_TENSOR},
    ),
    Case("unipelt_minilm", {"B": 4, "S": 33, "D": 384, "R": 24}, _UNIPELT, {**_MASKED, **_TENSOR}),
    Case("unipelt_bert", {"B": 1, "S": 65, "D": 768, "R": 48}, _UNIPELT, {**_MASKED, **_TENSOR}),
    Case("token_gate", _SMALL, "b_down b_up gate_weight gate_bias", {"pooling": "token"}),
    Case("masked_sentence", _SMALL, _UNIPELT, {**_MASKED, **_TENSOR}, {"mask": 0}),
    Case("gate_per_sample", _SMALL, "b_down b_up gate"),
    Case("gate_per_row", _SMALL, "b_down b_up gate:1"),
    Case("gate_zero", _SMALL, "b_down b_up gate", fill={"gate": 0.0}),
    Case("gate_one", _SMALL, "b_down b_up gate", fill={"gate": 1.0}),
    Case("learned_scale", _SMALL, "b_down b_up scale gate"),
    Case("scale_value", _SMALL, "b_up", {"scale_value": 2.5, "activation": "silu"}),
    Case(
        "adamix",
        {**_SMALL, "M": 4},
        "w_down:1 b_down:1 b_up down_index",
        {"activation": "gelu"},
        is_quick=True,
    ),
    Case(
        "adamix_both",
        {**_SMALL, "M": 4, "M_up": 3},
        "w_down:1 b_down:1 w_up:1 b_up:1 down_index up_index",
    ),
    Case(
        "bank_per_sample",
        {"B": 5, "S": 9, "D": 64, "R": 16, "M": 3, "M_up": 3},
        "w_down:1 b_down:1 w_up:1 b_up:1 down_index:1 up_index:1",
        {"activation": "gelu_tanh"},
        is_quick=True,
    ),
    Case("bank_of_one", {**_SMALL, "M": 1, "M_up": 1}, "w_down:1 w_up:1"),
    Case("vlm", _SMALL, "b_down b_up pre_norm_weight pre_norm_bias", is_quick=True),
    Case(
        "hyperpelt",
        _SMALL,
        "b_down b_up post_norm_weight post_norm_bias scale",
        {"activation": "gelu"},
        is_quick=True,
    ),
    Case(
        "everything",
        {"B": 3, "S": 11, "D": 72, "R": 20, "M": 2, "M_up": 2},
        "w_down:1 b_down:1 w_up:1 b_up:1 down_index:1 up_index:1 pre_norm_weight pre_norm_bias "
        "post_norm_weight post_norm_bias scale gate_weight gate_bias mask residual",
        {**_MASKED, **_TENSOR, "activation": "tanh", "dropout_p": 0.2, "scale_value": 0.5},
    ),
    Case("identity", _SMALL, "b_down", {"activation": "identity", "residual_from": "none"}),
    Case(
        "no_residual",
        _SMALL,
        _UNIPELT.replace(" residual", ""),
        {**_MASKED, "residual_from": "none"},
    ),
    Case("dropout", _SMALL, "b_down b_up gate", {"dropout_p": 0.3}, is_quick=True),
    Case("skip_rows", _SMALL, "b_down b_up gate:1", {"skip_below": 0.5}, is_inference=True),
    Case(
        "skip_sentences",
        {**_SMALL, "B": 6},
        "b_down b_up gate",
        {"skip_below": 0.5},
        is_inference=True,
    ),
    Case("one_row", {"B": 1, "S": 1, "D": 64, "R": 16}, _UNIPELT, {**_MASKED, **_TENSOR}),
    Case("no_rows", {"B": 0, "S": 5, "D": 64, "R": 16}, "b_down b_up"),
    Case("rank_1", {"B": 2, "S": 31, "D": 64, "R": 1}, "b_down b_up"),
    Case("rank_odd", {"B": 2, "S": 31, "D": 64, "R": 17}, "b_down b_up"),
    Case("rank_128", {"B": 1, "S": 63, "D": 128, "R": 128}, "b_down b_up"),
    Case("rank_512", {"B": 1, "S": 16, "D": 64, "R": 512}, "b_down b_up"),
    Case("rows_64", {"B": 1, "S": 64, "D": 64, "R": 16}, "b_down b_up"),
    Case("rows_65", {"B": 1, "S": 65, "D": 64, "R": 16}, "b_down b_up"),
    Case("rows_prime", {"B": 1, "S": 127, "D": 96, "R": 24}, "b_down b_up", {"activation": "silu"}),
    Case(
        "width_odd",
        {"B": 2, "S": 7, "D": 37, "R": 5},
        "b_down b_up gate_weight gate_bias",
        {"pooling": "mean"},
    ),
    Case("offset_view", _SMALL, _UNIPELT, {**_MASKED, **_TENSOR}, layout="offset"),
    Case("strided_view", _SMALL, _UNIPELT, {**_MASKED, **_TENSOR}, layout="strided"),
    Case("transposed_view", _SMALL, _UNIPELT, {**_MASKED, **_TENSOR}, layout="transposed"),
]
