"""LoRA as others compute it. Each knows one ungated branch, or one with a learned gate, over all
columns; banks and dropout are not theirs. PEFT itself, where it is installed, knows no gate.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
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


def _peft(is_float32: bool) -> Callable[..., tuple[Tensor]]:
    """PEFT's own layer: as shipped, with A and B in float32, or with `autocast_adapter_dtype=False`
    in the dtype of x. It is made once, and the factors of each call are put in their places.
    """
    layers: dict[Any, Any] = {}

    def peer(
        x: Tensor, weight: Tensor, bias: Tensor | None, a: list[Tensor], b: list[Tensor],
        *rest: Any, scales: list[float], **attributes: Any,
    ) -> tuple[Tensor]:  # fmt: skip
        key = (weight.data_ptr(), a[0].shape, scales[0])
        if key not in layers:
            layers.clear()
            layers[key] = _peft_layer(weight, bias, a[0].shape[0], scales[0])
        layer = layers[key]
        for factors, value in ((layer.lora_A, a[0]), (layer.lora_B, b[0])):
            factors["default"].weight = value.float() if is_float32 else value
        return (layer(x),)

    return peer


def _peft_layer(weight: Tensor, bias: Tensor | None, rank: int, scale: float) -> torch.nn.Module:
    """A frozen Linear as PEFT wraps it, without factors of its own."""
    import peft

    frozen_linear = torch.nn.Linear(*weight.T.shape, bias=bias is not None, device="meta")
    frozen_linear.weight = torch.nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        frozen_linear.bias = torch.nn.Parameter(bias.detach(), requires_grad=False)
    config = peft.LoraConfig(r=rank, lora_alpha=rank * scale, target_modules=["0"])
    wrapped = peft.inject_adapter_in_model(config, torch.nn.Sequential(frozen_linear))[0]
    for factors in (wrapped.lora_A, wrapped.lora_B):
        del factors["default"]._parameters["weight"]
    return wrapped


PEERS: dict[str, Any] = {
    "frozen linear": frozen,
    "three products": three_products,
    "float32 branch": _in_float32,
}
if importlib.util.find_spec("peft"):
    PEERS |= {"PEFT": _peft(True), "PEFT, x's dtype": _peft(False)}


def serves(name: str, case: Case) -> bool:
    """One branch of its own, without dropout; PEFT's without a gate."""
    is_ungated = "gate:-" in case.inputs and "gate_weight:-" in case.inputs
    if name.startswith("PEFT") and not is_ungated:
        return False
    return len(case.sizes.get("R_i", ())) == 1 and not (
        "index:0" in case.inputs or "index:1" in case.inputs or case.attributes.get("dropout_p")
    )
