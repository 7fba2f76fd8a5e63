"""lora_linear: what it takes and gives, and its formula in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._bank import check_bank, member
from .._contract import Contract, Signature, Value
from .._gate import accumulator, check_pooling, learned_gate, over_rows
from .._philox import dropout_factor
from .._product import linear

MAX_RANK = 256


def rules(signature: Signature, values: dict[str, Value]) -> None:
    """What shapes cannot say: which inputs go together, and that each branch stays inside the
    output.
    """
    name, sizes, attributes = signature.contract.name, signature.sizes, signature.attributes
    wanted = ("Din", "Dout") if attributes["transposed"] else ("Dout", "Din")
    if tuple(values["weight"].shape) != tuple(sizes[letter] for letter in wanted):
        raise ValueError(
            f"{name}: expected weight[{', '.join(wanted)}] ="
            f" [{', '.join(str(sizes[w]) for w in wanted)}]"
            f" (transposed={attributes['transposed']}), got {list(values['weight'].shape)}"
        )
    branches = len(values["a"])
    per_branch = ("b", "a_index", "b_index", "gate", "gate_weight", "gate_bias")
    counts = {key: len(values[key]) for key in per_branch}
    counts.update({key: len(attributes[key]) for key in ("offsets", "scales", "poolings")})
    for key, count in counts.items():
        if count != branches:
            raise ValueError(
                f"{name}: expected {branches} elements of {key} (one for each branch), got {count}"
            )
    extras = len(values["extra_weight"])
    if not extras == len(values["extra_bias"]) == len(attributes["extra_poolings"]):
        raise ValueError(
            f"{name}: expected as many extra_bias and extra_poolings as extra_weight ({extras}), "
            f"got {len(values['extra_bias'])} and {len(attributes['extra_poolings'])}"
        )
    for pooling in attributes["extra_poolings"]:
        check_pooling(name, pooling, values["mask"])
    for i in range(branches):
        _check_branch(signature, values, i)


def _check_branch(signature: Signature, values: dict[str, Value], i: int) -> None:
    name, sizes, attributes = signature.contract.name, signature.sizes, signature.attributes
    offset, size, rank = attributes["offsets"][i], sizes["size_i"][i], sizes["R_i"][i]
    if offset < 0 or offset + size > sizes["Dout"]:
        raise ValueError(
            f"{name}: expected branch {i} inside the output's {sizes['Dout']} columns, "
            f"got columns {offset} to {offset + size}"
        )
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(f"{name}: expected the rank of branch {i} in [1, {MAX_RANK}], got {rank}")
    for index, factor, letter in (("a_index", "a", "M_i"), ("b_index", "b", "N_i")):
        members = sizes.get(letter, ())
        size = members[i] if i < len(members) and members[i] is not None else 1
        check_bank(name, f"{factor}[{i}]", size, f"{index}[{i}]", values[index][i] is not None)
    if (values["gate_weight"][i] is None) != (values["gate_bias"][i] is None):
        raise ValueError(
            f"{name}: expected a learned gate with weight [Din] and bias [1], got only one (branch"
            f" {i})"
        )
    if values["gate_weight"][i] is not None:
        if values["gate"][i] is not None:
            raise ValueError(
                f"{name}: expected a gate tensor or a learned gate for branch {i}, got both"
            )
        check_pooling(name, attributes["poolings"][i], values["mask"])


def output_shapes(signature: Signature) -> dict[str, Any]:
    """The shapes of the outputs of a signature."""
    sizes, attributes = signature.sizes, signature.attributes
    b, s = sizes["B"], sizes["S"]

    def gate(pooling: str) -> tuple[int, ...]:
        return {"none": (0,), "token": (b, s)}.get(pooling, (b,))

    return {
        "y": (b, s, sizes["Dout"]),
        "extra_gates": [gate(pooling) for pooling in attributes["extra_poolings"]],
        "gate_values": [gate(pooling) for pooling in attributes["poolings"]],
        "s": (b, s, sum(sizes.get("R_i", ()))),
    }


CONTRACT = Contract(
    name="lora_linear",
    inputs="""
        x             activation    [B, S, Din]
        weight        parameter     [Dout, Din] | [Din, Dout]
        bias          parameter?    [Dout]
        a             parameter*    [R_i, Din] | [M_i, R_i, Din]
        b             parameter*    [size_i, R_i] | [N_i, size_i, R_i]
        a_index       index(M_i)?*  [] | [B]
        b_index       index(N_i)?*  [] | [B]
        gate          parameter?*   [B] | [B, S]
        gate_weight   parameter?*   [Din]
        gate_bias     parameter?*   [1]
        extra_weight  parameter*    [Din]
        extra_bias    parameter*    [1]
        mask          bool?         [B, S]
    """,
    attributes="""
        transposed      bool = false
        offsets         int[] = none    [0, inf)
        scales          float[] = none  (-inf, inf)
        poolings        str[] = none    none | token | mean | masked_mean
        extra_poolings  str[] = none    token | mean | masked_mean
        dropout_p       float = 0.0     [0, 1)
    """,
    outputs="""
        y            activation  differentiable
        extra_gates  float32*    differentiable
        gate_values  float32*    saved
        s            activation  saved private
    """,
    has_seed=True,
    rules=rules,
    output_shapes=output_shapes,
    never_zero="Din Dout M_i N_i size_i",
    longest_list=32,
)


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: list[Tensor],
    b: list[Tensor],
    a_index: list[Tensor | None],
    b_index: list[Tensor | None],
    gate: list[Tensor | None],
    gate_weight: list[Tensor | None],
    gate_bias: list[Tensor | None],
    extra_weight: list[Tensor],
    extra_bias: list[Tensor],
    mask: Tensor | None,
    *,
    transposed: bool,
    offsets: list[int],
    scales: list[float],
    poolings: list[str],
    extra_poolings: list[str],
    dropout_p: float,
    seed: int,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """y, the extra gates and the branches' learned gates, by the formula, differentiable by
    autograd.
    """
    y = linear(x, weight.T if transposed else weight, bias)
    dropped = x
    if dropout_p:
        dropped = x * dropout_factor(
            x.shape[0] * x.shape[1], x.shape[2], dropout_p, seed, x
        ).view_as(x)
    gate_values: list[Tensor] = []
    for i, offset in enumerate(offsets):
        s = linear(dropped, member(a[i], a_index[i], 2), None)
        delta = scales[i] * linear(s, member(b[i], b_index[i], 2), None)
        g, value = gate[i], x.new_empty(0, dtype=accumulator(x.dtype))
        w, c = gate_weight[i], gate_bias[i]
        if w is not None and c is not None:
            g = value = learned_gate(x, w, c, poolings[i], mask)
        gate_values.append(value)
        if g is not None:
            delta = delta * over_rows(g)
        columns = torch.nn.functional.pad(delta, (offset, y.shape[-1] - offset - delta.shape[-1]))
        y = y + columns.to(y.dtype)
    extras = [
        learned_gate(x, w, c, p, mask) for w, c, p in zip(extra_weight, extra_bias, extra_poolings)
    ]
    return y, extras, gate_values
