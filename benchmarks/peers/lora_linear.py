"""LoRA as others compute it. Each knows one ungated branch, or one with a learned gate, over all
columns; banks and dropout are not theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pelt_kernels.ops._cases import Case
from pelt_kernels.ops._gate import over_rows, pool, row_gates


def _gate(x: Tensor, given: dict[str, Any], poolings: list[str]) -> Tensor | None:
    if given["gate_weight"][0] is None:
        return None
    gate = row_gates(x, given["gate_weight"][0], given["gate_bias"][0])
    return over_rows(pool(gate, poolings[0], given["mask"]))


def three_products(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: list[Tensor], b: list[Tensor], *rest: Any,
    scales: list[float], poolings: list[str], **attributes: Any,
) -> tuple[Tensor]:  # fmt: skip
    """Three matrix products, the last of which adds to the first one's result."""
    names = ("a_index", "b_index", "gate", "gate_weight", "gate_bias", "_", "_", "mask")
    gate = _gate(x, dict(zip(names, rest)), poolings)
    rows = x.flatten(0, -2)
    y = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
    s = rows @ a[0].to(x.dtype).T
    if gate is not None:
        s = (s.view(*x.shape[:-1], -1) * gate).to(x.dtype).flatten(0, -2)
    return (torch.addmm(y, s, b[0].to(x.dtype).T, alpha=scales[0]).view(*x.shape[:-1], -1),)


def _in_float32(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: list[Tensor], b: list[Tensor], *rest: Any,
    scales: list[float], poolings: list[str], **attributes: Any,
) -> tuple[Tensor]:  # fmt: skip
    """PEFT's way as shipped: A and B are float32, and x is cast to them."""
    names = ("a_index", "b_index", "gate", "gate_weight", "gate_bias", "_", "_", "mask")
    gate = _gate(x, dict(zip(names, rest)), poolings)
    y = torch.nn.functional.linear(x, weight, bias)
    low = torch.nn.functional.linear(x.float(), a[0].float())
    delta = torch.nn.functional.linear(low, b[0].float()) * scales[0]
    return ((y + (delta if gate is None else delta * gate)).to(x.dtype),)


def frozen(
    x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any, **named: Any
) -> tuple[Tensor]:
    """The Linear alone: what the branch and its gate cost shows beside it."""
    return (torch.nn.functional.linear(x, weight, bias),)


PEERS: dict[str, Any] = {
    "frozen linear": frozen,
    "three products": three_products,
    "float32 branch": _in_float32,
}


def serves(name: str, case: Case) -> bool:
    """One branch of its own, without dropout."""
    return len(case.sizes.get("R_i", ())) == 1 and not (
        "index:0" in case.inputs or "index:1" in case.inputs or case.attributes.get("dropout_p")
    )
