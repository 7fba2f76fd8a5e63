"""LoRA as others compute it. `plain` is the Linear with its branches as people write them; the
others have one branch over all columns, without banks and dropout; PEFT's own layer, where PEFT is
installed, has no gate.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..from_tests import Case, cases
from . import _parts

F = torch.nn.functional


def plain(
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
    **rest: Any,
) -> tuple[Tensor, list[Tensor]]:
    """Linear(x) + gate * scale * B(A(dropout(x))) for each branch, and the extra gates; the seed is
    torch's own affair.
    """
    y = _parts.linear(x, weight.T if transposed else weight, bias)
    dropped = F.dropout(x, dropout_p) if dropout_p else x
    for i, offset in enumerate(offsets):
        low = _parts.linear(dropped, a[i], None, a_index[i])
        delta = _parts.linear(low, b[i], None, b_index[i])
        factor = _factor(x, scales[i], gate[i], gate_weight[i], gate_bias[i], poolings[i], mask)
        if isinstance(factor, Tensor) or factor != 1:
            delta = factor * delta
        if delta.shape != y.shape:
            delta = F.pad(delta, (offset, y.shape[-1] - offset - delta.shape[-1]))
        y = y + delta
    extras = [
        _parts.learned_gate(x, *learned, mask).squeeze(2)
        for learned in zip(extra_weight, extra_bias, extra_poolings)
    ]
    return y, [e.squeeze(1) if p != "token" else e for e, p in zip(extras, extra_poolings)]


def _factor(
    x: Tensor, scale: float, gate: Tensor | None, weight: Tensor | None, bias: Tensor | None,
    pooling: str, mask: Tensor | None,
) -> Tensor | float:  # fmt: skip
    """What multiplies a branch: a number, or a small tensor."""
    if weight is not None and bias is not None:
        return scale * _parts.learned_gate(x, weight, bias, pooling, mask)
    return scale if gate is None else scale * _parts.over_rows(gate, x)


def _only_factor(x: Tensor, rest: tuple[Any, ...], named: dict[str, Any]) -> Tensor | float:
    """`_factor` of the one branch, from what follows a and b in the contract's order."""
    _, _, gate, weight, bias, _, _, mask = rest
    return _factor(x, named["scales"][0], gate[0], weight[0], bias[0], named["poolings"][0], mask)


def three_products(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: list[Tensor], b: list[Tensor], *rest: Any,
    **named: Any,
) -> tuple[Tensor]:  # fmt: skip
    """Three matrix products, the last of which adds to the first one's result."""
    factor = _only_factor(x, rest, named)
    rows = x.flatten(0, -2)
    y = rows @ weight.T if bias is None else torch.addmm(bias, rows, weight.T)
    s = rows @ a[0].to(x.dtype).T
    alpha = factor if isinstance(factor, float) else 1.0
    if isinstance(factor, Tensor):
        s = (s.unflatten(0, x.shape[:-1]) * factor).flatten(0, -2)
    return (torch.addmm(y, s, b[0].to(x.dtype).T, alpha=alpha).unflatten(0, x.shape[:-1]),)


def _in_float32(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: list[Tensor], b: list[Tensor], *rest: Any,
    **named: Any,
) -> tuple[Tensor]:  # fmt: skip
    """PEFT's way as shipped: A and B are float32, and x is cast to them."""
    y = F.linear(x, weight, bias)
    low = F.linear(x.float(), a[0].float())
    return ((y + F.linear(low, b[0].float()) * _only_factor(x, rest, named)).to(x.dtype),)


def frozen(
    x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any, **named: Any
) -> tuple[Tensor]:
    """The Linear alone: what the branch and its gate cost shows beside it."""
    return (F.linear(x, weight, bias),)


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
    "plain": plain,
    "frozen linear": frozen,
    "three products": three_products,
    "float32 branch": _in_float32,
}
if importlib.util.find_spec("peft"):
    PEERS |= {"PEFT": _peft(True), "PEFT, x's dtype": _peft(False)}


def serves(name: str, case: Case) -> bool:
    """`plain` every case, others one branch of their own without dropout; PEFT's without a gate."""
    if name == "plain":
        return True
    given = cases.given_in(case)
    if name.startswith("PEFT") and {"gate", "gate_weight"} & given:
        return False
    is_whole = case.sizes.get("size_i") == (case.sizes["Dout"],)
    return is_whole and not (
        {"a_index", "b_index", "extra_weight"} & given
        or case.attributes.get("transposed")
        or case.attributes.get("dropout_p")
    )
