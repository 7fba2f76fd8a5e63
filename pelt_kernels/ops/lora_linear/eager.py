"""lora_linear composed of PyTorch operations, with the closed form of its gradient.

Backward keeps x and s = dropout(x) Aᵀ [T, ΣR]. With raw = dy B (the branch's columns of dy), the
gate's gradient is ``scale <raw, s>`` and that of s is ``scale g raw``: no branch output is made
again.

Beside the base product nothing has a pass over [T, Dout] or [T, Din] of its own: a branch's last
product adds to what the base product wrote, forward and backward, and all that is narrow (branches
and learned gates) is side by side in one product for dx and one for the gradients of its rows.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from .._bank import linear, member, member_grad, weight_grad
from .._contract import Chosen, Signature, Value
from .._gate import accumulator, cast, counted, over_rows, pool, pool_backward, quick_row_gates
from .._philox import dropout_factor


def supports(signature: Signature, backend: str, form: str, needs_grad: bool = True) -> str:
    """PyTorch serves every signature."""
    return ""


def forward(
    chosen: Chosen, seed: int, **inputs: Value
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """y [B, S, Dout], the extra gates, the branches' learned gates (or [0] each), and s [B, S, ΣR]
    for backward.
    """
    t, x = SimpleNamespace(**inputs), inputs["x"]
    at, acc = chosen.attributes, accumulator(x.dtype)
    y = linear(x, t.weight.T if at["transposed"] else t.weight, t.bias)
    dropped = _dropped(chosen, x, seed)
    values: list[Tensor] = []
    parts: list[Tensor] = []
    for i, offset in enumerate(at["offsets"]):
        parts.append(linear(dropped, member(t.a[i], t.a_index[i], 2), None))
        g, value = t.gate[i], x.new_empty(0, dtype=acc)
        w, c = t.gate_weight[i], t.gate_bias[i]
        if w is not None and c is not None:
            g = value = pool(quick_row_gates(x, w, c), at["poolings"][i], t.mask)
        values.append(value)
        up = cast(member(t.b[i], t.b_index[i], 2), x.dtype)
        columns = y[..., offset : offset + up.shape[-2]]
        _add_product(columns, _times(parts[-1], _factor(chosen, i, g)), up.transpose(-1, -2))
    s = parts[0] if len(parts) == 1 else torch.cat([x.new_empty(*x.shape[:2], 0), *parts], dim=-1)
    poolings = at["extra_poolings"]
    extras = [
        pool(quick_row_gates(x, w, c), p, t.mask)
        for w, c, p in zip(t.extra_weight, t.extra_bias, poolings)
    ]
    return y, extras, values, s


def backward(
    chosen: Chosen,
    needs: dict[str, bool],
    dy: Tensor,
    dextra_gates: list[Tensor],
    gate_values: list[Tensor],
    s: Tensor,
    seed: int,
    **inputs: Value,
) -> dict[str, Value]:
    """The gradients that ``needs`` names, by input name."""
    t, x = SimpleNamespace(**inputs), inputs["x"]
    at, acc = chosen.attributes, accumulator(x.dtype)
    grads: dict[str, Value] = {
        name: [None] * len(t.a) for name in ("a", "b", "gate", "gate_weight", "gate_bias")
    }
    grads |= {"extra_weight": [], "extra_bias": []}
    of_x: list[_Narrow] = []  # what reads x as it is: gates, and branches without dropout
    of_dropped = [] if at["dropout_p"] else of_x
    dropped = _dropped(chosen, x, seed)
    parts = s.split(list(chosen.sizes.get("R_i", ())), dim=-1)
    for i, offset in enumerate(at["offsets"]):
        up, down = member(t.b[i], t.b_index[i], 2), member(t.a[i], t.a_index[i], 2)
        d = dy[..., offset : offset + up.shape[-2]]
        w, c = t.gate_weight[i], t.gate_bias[i]
        value = t.gate[i] if w is None else gate_values[i]
        factor = _factor(chosen, i, value)
        raw = d @ cast(up, x.dtype)
        if needs["b"]:
            each = weight_grad(d, _times(parts[i], factor), up.ndim == 3)
            grads["b"][i] = member_grad(each, t.b[i], t.b_index[i])
        of_dropped.append(_Narrow("a", i, _times(raw, factor), down))
        if value is None:
            continue
        dgate = (raw.to(acc) * parts[i]).sum(-1 if value.ndim == 2 else (1, 2)) * at["scales"][i]
        if w is not None and c is not None:
            dlogit = pool_backward(dgate, quick_row_gates(x, w, c), at["poolings"][i], t.mask)
            of_x.append(_Narrow("gate_weight", i, dlogit[..., None], w[None]))
            grads["gate_bias"][i] = dlogit.sum().reshape(1).to(c.dtype)
        else:
            grads["gate"][i] = dgate.to(value.dtype)
    extras = zip(dextra_gates, t.extra_weight, t.extra_bias, at["extra_poolings"])
    for i, (dgate, w, c, pooling) in enumerate(extras):
        dlogit = pool_backward(dgate, quick_row_gates(x, w, c), pooling, t.mask)
        hidden = t.mask if pooling == "masked_mean" else None
        of_x.append(_Narrow("extra_weight", i, dlogit[..., None], w[None], hidden))
        grads["extra_weight"].append(None)
        grads["extra_bias"].append(dlogit.sum().reshape(1).to(c.dtype))

    _row_gradients(grads, needs, x, of_x)
    if of_dropped is not of_x:
        _row_gradients(grads, needs, dropped, of_dropped)
    if needs["a"]:
        grads["a"] = [member_grad(*each) for each in zip(grads["a"], t.a, t.a_index)]
    for name, rows in (("gate_weight", t.gate_weight), ("extra_weight", t.extra_weight)):
        if needs[name]:
            pairs = zip(grads[name], rows)
            grads[name] = [None if w is None else grad[0].to(w.dtype) for grad, w in pairs]
    if needs["x"]:
        dx = grads["x"] = dy @ cast(t.weight.T if at["transposed"] else t.weight, x.dtype)
        _add_products(dx, of_x)
        if of_dropped is not of_x:
            ddropped = torch.zeros_like(dx)
            _add_products(ddropped, of_dropped)
            dx.addcmul_(ddropped, _factor_of_dropout(chosen, x, seed))
    if needs["weight"]:
        dweight = weight_grad(dy, x, False)
        grads["weight"] = (
            (dweight.T if at["transposed"] else dweight).to(t.weight.dtype).contiguous()
        )
    if t.bias is not None and needs["bias"]:
        grads["bias"] = dy.sum(dim=(0, 1), dtype=acc).to(t.bias.dtype)
    return {name: grads[name] for name, need in needs.items() if need}


class _Narrow(NamedTuple):
    """A part of dx, columns @ rows, with the input whose gradient, columnsᵀ x, its rows have."""

    name: str
    i: int
    columns: Tensor  # [B, S, R]
    rows: Tensor  # [R, Din], or one for each sample [B, R, Din]
    mask: Tensor | None = None  # of the rows of x that count in that gradient


def _joined(parts: list[_Narrow], dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Columns and rows: first those of all parts that samples share, side by side, with rows of 0
    to a multiple of 4; then each of the others.
    """
    columns = [part.columns.to(dtype) for part in parts if part.rows.ndim == 2]
    rows = [part.rows.to(dtype) for part in parts if part.rows.ndim == 2]
    if len(rows) > 1:
        width = -sum(len(part) for part in rows) % 4
        columns.append(columns[0].new_zeros(*columns[0].shape[:2], width))
        rows.append(rows[0].new_zeros(width, rows[0].shape[1]))
        columns, rows = [torch.cat(columns, -1)], [torch.cat(rows)]
    others = [part for part in parts if part.rows.ndim == 3]
    return [*zip(columns, rows), *((p.columns.to(dtype), p.rows.to(dtype)) for p in others)]


def _add_product(out: Tensor, columns: Tensor, rows: Tensor) -> None:
    """out += columns @ rows, in place."""
    if rows.ndim == 2:
        b, s, width = out.shape  # `view` refuses what a copy would make lose its result
        out.view(b * s, width).addmm_(columns.flatten(0, 1), rows)
    else:
        out.baddbmm_(columns, rows)


def _add_products(dx: Tensor, parts: list[_Narrow]) -> None:
    for columns, rows in _joined(parts, dx.dtype):
        _add_product(dx, columns, rows)


def _row_gradients(
    grads: dict[str, Value], needs: dict[str, bool], x: Tensor, parts: list[_Narrow]
) -> None:
    """columnsᵀ x of each part that is needed, into its place in ``grads``."""
    parts = [part for part in parts if needs[part.name]]
    shared = [part for part in parts if part.rows.ndim == 2 and part.mask is None]
    for part in parts:
        if part.mask is not None:
            columns, rows = part.columns.to(x.dtype), counted(x, part.mask)
            grads[part.name][part.i] = weight_grad(columns, rows, False)
        elif part.rows.ndim == 3:
            grads[part.name][part.i] = weight_grad(part.columns, x, True)
    if not shared:
        return
    columns, rows = _joined(shared, x.dtype)[0]
    both = weight_grad(columns, x, False)
    if len(shared) == 1:
        grads[shared[0].name][shared[0].i] = both
        return
    sizes = [len(part.rows) for part in shared]
    for part, grad in zip(shared, both.split([*sizes, len(rows) - sum(sizes)])):
        grads[part.name][part.i] = grad.clone()


def _times(rows: Tensor, factor: Tensor | float) -> Tensor:
    """factor · rows; the rows themselves if it is 1."""
    return rows if isinstance(factor, float) and factor == 1.0 else rows * factor


def _factor(chosen: Chosen, i: int, gate: Tensor | None) -> Tensor | float:
    """scale_i · g_i, broadcastable over [B, S, R]."""
    scale: float = chosen.attributes["scales"][i]
    return scale if gate is None else (over_rows(gate) * scale).to(chosen.dtype)


def _dropped(chosen: Chosen, x: Tensor, seed: int) -> Tensor:
    return x * _factor_of_dropout(chosen, x, seed) if chosen.attributes["dropout_p"] else x


def _factor_of_dropout(chosen: Chosen, x: Tensor, seed: int) -> Tensor:
    rows = x.shape[0] * x.shape[1]
    return dropout_factor(rows, x.shape[2], chosen.attributes["dropout_p"], seed, x).view_as(x)
