"""lora_linear composed of PyTorch operations, with the closed form of its gradient.

Backward keeps x and s = dropout(x) Aᵀ [T, ΣR]. With raw = dy B (the branch's columns of dy), the
gate's gradient is ``scale <raw, s>`` and that of s is ``scale g raw``: no branch output is made
again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._bank import linear, member, member_grad, weight_grad
from .._contract import Call, Value
from .._gate import accumulator, over_rows, pool, pool_backward, row_gates
from .._philox import dropout_factor


def supports(call: Call) -> str:
    """PyTorch serves every call."""
    return ""


def forward(
    call: Call,
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
    seed: int,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """y [B, S, Dout], the extra gates, the branches' learned gates (or [0] each), and s [B, S, ΣR]
    for backward.
    """
    at, acc = call.attributes, accumulator(x.dtype)
    y = linear(x, weight.T if at["transposed"] else weight, bias)
    dropped = _dropped(call, x, seed)
    values: list[Tensor] = []
    parts: list[Tensor] = []
    for i, offset in enumerate(at["offsets"]):
        parts.append(linear(dropped, member(a[i], a_index[i], 2), None))
        g, value = gate[i], x.new_empty(0, dtype=acc)
        w, c = gate_weight[i], gate_bias[i]
        if w is not None and c is not None:
            g = value = pool(row_gates(x, w, c), at["poolings"][i], mask)
        values.append(value)
        delta = linear(parts[-1] * _factor(call, i, g), member(b[i], b_index[i], 2), None)
        y[..., offset : offset + delta.shape[-1]] += delta
    s = torch.cat(parts, dim=-1) if parts else x.new_empty(*x.shape[:2], 0)
    poolings = at["extra_poolings"]
    extras = [
        pool(row_gates(x, w, c), p, mask).clone()
        for w, c, p in zip(extra_weight, extra_bias, poolings)
    ]
    return y, extras, values, s


def backward(
    call: Call,
    needs: dict[str, bool],
    dy: Tensor,
    dextra_gates: list[Tensor],
    gate_values: list[Tensor],
    s: Tensor,
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
    seed: int,
) -> dict[str, Value]:
    """The gradients that ``needs`` names, by input name."""
    at, acc = call.attributes, accumulator(x.dtype)
    grads: dict[str, Value] = {
        name: [None] * len(a) for name in ("a", "b", "gate", "gate_weight", "gate_bias")
    }
    grads |= {"extra_weight": [], "extra_bias": []}
    base = (weight.T if at["transposed"] else weight).to(x.dtype)
    dx = dy @ base if needs["x"] else torch.zeros_like(x)
    dropped = _dropped(call, x, seed)
    ddropped = torch.zeros_like(dx)
    parts = s.split(list(call.sizes.get("R_i", ())), dim=-1)
    for i, offset in enumerate(at["offsets"]):
        up, down = member(b[i], b_index[i], 2), member(a[i], a_index[i], 2)
        d = dy[..., offset : offset + up.shape[-2]]
        w, c = gate_weight[i], gate_bias[i]
        value = gate[i] if w is None else gate_values[i]
        factor = _factor(call, i, value)
        raw = d @ up.to(x.dtype)
        ds = raw * factor
        grads["b"][i] = member_grad(
            weight_grad(d, parts[i] * factor, up.ndim == 3), b[i], b_index[i]
        )
        grads["a"][i] = member_grad(weight_grad(ds, dropped, down.ndim == 3), a[i], a_index[i])
        ddropped += ds @ down.to(x.dtype)
        if value is None:
            continue
        row_dot = at["scales"][i] * (raw.to(acc) * parts[i]).sum(-1)
        dgate = row_dot if value.ndim == 2 else row_dot.sum(1)
        if w is not None and c is not None:
            step = _gate_step(x, dgate, w, c, at["poolings"][i], mask)
            dx, grads["gate_weight"][i], grads["gate_bias"][i] = dx + step[0], step[1], step[2]
        else:
            grads["gate"][i] = dgate.to(value.dtype)
    extras = zip(dextra_gates, extra_weight, extra_bias, at["extra_poolings"])
    for dgate, weight_row, bias_row, pooling in extras:
        step = _gate_step(x, dgate, weight_row, bias_row, pooling, mask)
        dx = dx + step[0]
        grads["extra_weight"].append(step[1])
        grads["extra_bias"].append(step[2])
    if at["dropout_p"]:
        ddropped = ddropped * _factor_of_dropout(call, x, seed)
    grads["x"] = dx + ddropped
    if needs["weight"]:
        dweight = weight_grad(dy, x, False)
        grads["weight"] = (dweight.T if at["transposed"] else dweight).to(weight.dtype).contiguous()
    if bias is not None and needs["bias"]:
        grads["bias"] = dy.sum(dim=(0, 1), dtype=acc).to(bias.dtype)
    return {name: grads[name] for name, need in needs.items() if need}


def _gate_step(
    x: Tensor, dgate: Tensor, weight: Tensor, bias: Tensor, pooling: str, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What a learned gate adds to dx, and its weight's and bias's gradients."""
    dlogit = pool_backward(dgate, row_gates(x, weight, bias), pooling, mask)
    dweight = torch.einsum("bs,bsd->d", dlogit, x.to(dlogit.dtype)).to(weight.dtype)
    return (
        (dlogit[..., None] * weight.to(x.dtype)).to(x.dtype),
        dweight,
        dlogit.sum().reshape(1).to(bias.dtype),
    )


def _factor(call: Call, i: int, gate: Tensor | None) -> Tensor | float:
    """scale_i · g_i, broadcastable over [B, S, R]."""
    scale: float = call.attributes["scales"][i]
    return scale if gate is None else (over_rows(gate) * scale).to(call.dtype)


def _dropped(call: Call, x: Tensor, seed: int) -> Tensor:
    return x * _factor_of_dropout(call, x, seed) if call.attributes["dropout_p"] else x


def _factor_of_dropout(call: Call, x: Tensor, seed: int) -> Tensor:
    rows = x.shape[0] * x.shape[1]
    return dropout_factor(rows, x.shape[2], call.attributes["dropout_p"], seed, x).view_as(x)
