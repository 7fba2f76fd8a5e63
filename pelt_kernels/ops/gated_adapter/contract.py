"""gated_adapter: what it takes and gives, and its formula in plain PyTorch."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._bank import check_bank, member
from .._contract import Contract, Signature, Value
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


def rules(signature: Signature, values: dict[str, Value]) -> None:
    """What shapes cannot say: which inputs go together."""
    name, given, attributes = signature.contract.name, signature.given, signature.attributes
    for norm, side in (("pre_norm", "w_down"), ("post_norm", "w_up")):
        if (f"{norm}_weight" in given) != (f"{norm}_bias" in given):
            raise ValueError(
                f"{name}: expected {norm} with weight and bias, got only one of the two"
            )
        if f"{norm}_weight" in given:
            _check_norm(name, norm, side, values)
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
    check_bank(name, "w_down", signature.sizes.get("M", 1), "down_index", "down_index" in given)
    check_bank(name, "w_up", signature.sizes.get("M_up", 1), "up_index", "up_index" in given)
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


def _check_norm(name: str, norm: str, side: str, values: dict[str, Value]) -> None:
    """Raises ValueError for half a bank of norms, and for one beside a projection that is none."""
    weight, bias, projection = values[f"{norm}_weight"], values[f"{norm}_bias"], values[side]
    if weight.ndim != bias.ndim:
        raise ValueError(
            f"{name}: expected {norm}'s weight and bias both as banks or both as single, got weight"
            f" {list(weight.shape)} and bias {list(bias.shape)}"
        )
    if weight.ndim == 2 and projection.ndim == 2:
        raise ValueError(
            f"{name}: expected {side} as a bank beside a bank {norm} of {weight.shape[0]} members, "
            f"got {side} {list(projection.shape)}; give it as many members, such as "
            f"{side}.expand({weight.shape[0]}, -1, -1)"
        )


def output_shapes(signature: Signature) -> dict[str, Any]:
    """The shapes of the outputs of a signature."""
    b, s, d, r = (signature.sizes[letter] for letter in "BSDR")
    gate: tuple[int, ...] = (0,)
    if "gate_weight" in signature.given:
        gate = (b, s) if signature.attributes["pooling"] == "token" else (b,)
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
        pre_norm_weight  parameter?    [D] | [M, D]
        pre_norm_bias    parameter?    [D] | [M, D]
        post_norm_weight parameter?    [D] | [M_up, D]
        post_norm_bias   parameter?    [D] | [M_up, D]
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


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension, statistics in the accumulator dtype; weight and bias [D],
    or [B, D] for the rows of each sample, then rounded once as with [D].
    """
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    if weight.ndim == 1:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    acc = accumulator(x.dtype)
    hat = torch.nn.functional.layer_norm(x.to(acc), x.shape[-1:], eps=eps)
    return torch.addcmul(bias.to(acc)[:, None], hat, weight.to(acc)[:, None]).to(x.dtype)


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
        weight, bias = member(pre_norm_weight, down_index, 1), member(pre_norm_bias, down_index, 1)
        z = layer_norm(x, weight, bias, pre_norm_eps)
    h = linear(z, member(w_down, down_index, 2), member(b_down, down_index, 1))
    u = linear(ACTIVATIONS[activation](h), member(w_up, up_index, 2), member(b_up, up_index, 1))
    if post_norm_weight is not None and post_norm_bias is not None:
        weight, bias = member(post_norm_weight, up_index, 1), member(post_norm_bias, up_index, 1)
        u = layer_norm(u, weight, bias, post_norm_eps)
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
