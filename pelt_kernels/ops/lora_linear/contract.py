"""lora_linear: what it takes and gives, its formula in plain PyTorch, and the cases it is tested
on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._bank import check_bank, member
from .._cases import Case, uniform
from .._contract import Call, Contract, Value
from .._gate import accumulator, check_pooling, learned_gate, over_rows
from .._philox import dropout_factor
from .._product import linear

MAX_RANK = 256


def rules(call: Call, values: dict[str, Value]) -> None:
    """What shapes cannot say: which inputs go together, and that each branch stays inside the
    output.
    """
    name, sizes, attributes = call.contract.name, call.sizes, call.attributes
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
        _check_branch(call, values, i)


def _check_branch(call: Call, values: dict[str, Value], i: int) -> None:
    name, sizes, attributes = call.contract.name, call.sizes, call.attributes
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


def output_shapes(call: Call) -> dict[str, Any]:
    """The shapes of the outputs of a call."""
    sizes, attributes = call.sizes, call.attributes
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
)

DRAWS = {"gate": uniform}


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


def _branches(*ranks: int, d_in: int, size: int, **more: Any) -> dict[str, Any]:
    return {
        "B": 2,
        "S": 13,
        "Din": d_in,
        "Dout": d_in,
        "R_i": ranks,
        "size_i": (size,) * len(ranks),
        **more,
    }


def _case(id: str, sizes: dict[str, Any], inputs: str, scales: list[float], **more: Any) -> Case:
    """A case with branches: ``inputs`` without the lists that every branch has."""
    n, words = len(scales), {word.partition(":")[0] for word in inputs.split()}
    absent = ",".join("-" * n)
    for name in ("a_index", "b_index", "gate", "gate_weight", "gate_bias"):
        inputs += f" {name}:{absent}" if n and name not in words else ""
    for name in ("a", "b"):
        inputs += f" {name}:{','.join('0' * n)}" if n and name not in words else ""
    attributes = {
        "offsets": [0] * n,
        "scales": scales,
        "poolings": ["none"] * n,
        **more.pop("attributes", {}),
    }
    return Case(id, sizes, inputs, attributes, **more)


_GATED = {"poolings": ["masked_mean"]}
_ONE = _branches(8, d_in=64, size=64)

CASES = [
    _case("no_branch", {"B": 2, "S": 5, "Din": 32, "Dout": 48}, "bias", []),
    _case("lora", _ONE, "bias", [2.0], is_quick=True),
    _case("lora_no_bias", _branches(3, d_in=32, size=32), "", [0.5]),
    _case(
        "unipelt",
        _ONE,
        "bias gate_weight:0 gate_bias:0 mask",
        [1.0],
        attributes=_GATED,
        is_quick=True,
    ),
    _case(
        "unipelt_query",
        _branches(8, d_in=96, size=96),
        "bias gate_weight:0 gate_bias:0 extra_weight:0 extra_bias:0 mask",
        [1.0],
        attributes={**_GATED, "extra_poolings": ["masked_mean"]},
        is_quick=True,
    ),
    _case(
        "extra_gates_only",
        {"B": 3, "S": 7, "Din": 40, "Dout": 24},
        "bias extra_weight:0,0 extra_bias:0,0",
        [],
        attributes={"extra_poolings": ["mean", "token"]},
    ),
    _case(
        "fused_qkv",
        {**_branches(4, 4, d_in=48, size=48), "Dout": 144},
        "bias gate_weight:0,0 gate_bias:0,0 mask",
        [1.0, 1.0],
        attributes={"offsets": [0, 96], "poolings": ["masked_mean", "mean"]},
        is_quick=True,
    ),
    _case(
        "conv1d",
        {**_branches(4, d_in=48, size=48), "Dout": 144},
        "bias weight:1",
        [8.0],
        attributes={"transposed": True},
    ),
    _case("overlapping", _branches(4, 6, d_in=32, size=32), "bias", [1.0, 0.5]),
    _case("gate_per_sample", _ONE, "bias gate:0", [2.0]),
    _case("gate_per_row", _ONE, "bias gate:1", [2.0]),
    _case("gate_zero", _ONE, "bias gate:0", [2.0], fill={"gate": 0.0}),
    _case(
        "token_gate",
        _ONE,
        "bias gate_weight:0 gate_bias:0",
        [2.0],
        attributes={"poolings": ["token"]},
    ),
    _case("adamix", {**_ONE, "M_i": (4,)}, "bias a:1 a_index:0", [8.0]),
    _case(
        "bank_per_sample",
        {**_ONE, "B": 4, "M_i": (3,), "N_i": (2,)},
        "bias a:1 b:1 a_index:1 b_index:1",
        [1.0],
        is_quick=True,
    ),
    _case("b_zero", _ONE, "bias", [2.0], fill={"b": 0.0}),
    _case("dropout", _ONE, "bias gate:0", [2.0], attributes={"dropout_p": 0.25}, is_quick=True),
    _case("rank_1", _branches(1, d_in=64, size=64), "bias", [1.0]),
    _case("rank_17", _branches(17, d_in=64, size=64), "bias", [1.0]),
    _case("rank_64", _branches(64, d_in=64, size=64), "bias", [1.0]),
    _case("rank_256", _branches(256, d_in=64, size=64), "bias", [1.0]),
    _case("rows_129", {**_branches(16, d_in=128, size=128), "B": 1, "S": 129}, "bias", [1.0]),
    _case(
        "width_odd",
        {**_branches(5, d_in=37, size=11), "Dout": 29},
        "bias",
        [1.0],
        attributes={"offsets": [18]},
    ),
    _case("no_rows", {**_ONE, "B": 0}, "bias", [2.0]),
    _case("offset_view", _ONE, "bias", [2.0], layout="offset"),
    _case("strided_view", _ONE, "bias", [2.0], layout="strided"),
    _case("transposed_view", _ONE, "bias", [2.0], layout="transposed"),
]
