"""gated_adapter composed of PyTorch operations, with the closed form of its gradient.

Backward keeps x and h only. With v = dy' W_up (dy' = dy after dropout), the gate's gradient needs
no up projection again: ``<dy', W_up a + b_up> = <v, a> + <dy', b_up>``; with a post-norm the
adapter's output is recomputed from h.

Passes over [T, D] are what costs beside the products, so factors go to the narrow side: backward
multiplies a and v [T, R] by scale and gate, never dy, and a learned gate's part of dx and its
weight's gradient are one more column in the products of the down projection. Forward writes the
output over the up projection's.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from .._bank import bias_grad, linear, member, member_grad, weight_grad
from .._contract import Chosen, Signature, Value
from .._gate import accumulator, cast, over_rows, pool, pool_backward, quick_row_gates
from .._philox import dropout_factor
from .contract import ACTIVATIONS, NEVER_SKIP, layer_norm


def supports(signature: Signature, backend: str, form: str, needs_grad: bool = True) -> str:
    """PyTorch serves every signature."""
    return ""


def forward(chosen: Chosen, seed: int, **inputs: Value) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, S, D], the learned gate's value (or [0]), and h [B, S, R] for backward."""
    t, x, at = SimpleNamespace(**inputs), inputs["x"], chosen.attributes
    gate, gate_value = t.gate, x.new_empty(0, dtype=accumulator(x.dtype))
    if t.gate_weight is not None:
        gates = quick_row_gates(x, t.gate_weight, t.gate_bias)
        gate = gate_value = pool(gates, at["pooling"], t.mask)
    residual = x if at["residual_from"] == "input" else t.residual
    is_skipped = None
    if gate is not None and at["skip_below"] > NEVER_SKIP:
        is_skipped = over_rows(gate) < at["skip_below"]
        if _may_gather(chosen, t) and is_skipped.any():
            return _of_kept_rows(chosen, t, residual, gate, is_skipped), gate_value, _no_h(t)
    h, u = _projected(chosen, t, x)
    if at["dropout_p"]:
        u = u.mul_(_dropout(chosen, seed, u))
    if is_skipped is not None:
        u = u.masked_fill_(is_skipped, 0.0)
    return _added(residual, u, _factor(chosen, t.scale, gate)), gate_value, h


def _projected(chosen: Chosen, t: SimpleNamespace, x: Tensor) -> tuple[Tensor, Tensor]:
    """h [B, S, R] and the adapter's output before dropout [B, S, D]."""
    at, (pre_norm, post_norm) = chosen.attributes, _norms(t)
    z = x if pre_norm is None else layer_norm(x, *pre_norm, at["pre_norm_eps"])
    h = linear(z, member(t.w_down, t.down_index, 2), member(t.b_down, t.down_index, 1))
    u = linear(
        ACTIVATIONS[at["activation"]](h),
        member(t.w_up, t.up_index, 2),
        member(t.b_up, t.up_index, 1),
    )
    return h, u if post_norm is None else layer_norm(u, *post_norm, at["post_norm_eps"])


def _may_gather(chosen: Chosen, t: SimpleNamespace) -> bool:
    """Whether rows may be picked out of x: on a CPU, where nobody waits for the choice, and where
    what a row is multiplied by does not depend on its place.
    """
    indices = (t.down_index, t.up_index)
    has_own = any(index is not None and index.ndim for index in indices)
    return chosen.device.type == "cpu" and not has_own and not chosen.attributes["dropout_p"]


def _of_kept_rows(
    chosen: Chosen,
    t: SimpleNamespace,
    residual: Tensor | None,
    gate: Tensor,
    is_skipped: Tensor,
) -> Tensor:
    """y [B, S, D] where only the rows that do not skip are computed."""
    y = torch.zeros_like(t.x) if residual is None else residual.clone()
    kept = ~is_skipped.expand(*t.x.shape[:2], 1)[..., 0]
    gates = over_rows(gate).expand(*t.x.shape[:2], 1)[kept][None, :, 0]
    if gates.numel():
        u = _projected(chosen, t, t.x[kept][None])[1]
        rows = None if residual is None else residual[kept][None]
        y[kept] = _added(rows, u, _factor(chosen, t.scale, gates))[0]
    return y


def _no_h(t: SimpleNamespace) -> Tensor:
    """What stands for h, which only a gradient reads: none is wanted where rows are skipped."""
    return t.x.new_zeros(*t.x.shape[:2], t.w_down.shape[-2])


def backward(
    chosen: Chosen,
    needs: dict[str, bool],
    dy: Tensor,
    gate_value: Tensor,
    h: Tensor,
    seed: int,
    **inputs: Value,
) -> dict[str, Value]:
    """The gradients that ``needs`` names, by input name."""
    t, x = SimpleNamespace(**inputs), inputs["x"]
    at, acc = chosen.attributes, accumulator(x.dtype)
    value = t.gate if t.gate_weight is None else gate_value
    factor = _factor(chosen, t.scale, value)
    a = ACTIVATIONS[at["activation"]](h)
    dropped = dy * _dropout(chosen, seed, dy) if at["dropout_p"] else dy
    up_rows = (member(t.w_up, t.up_index, 2), member(t.b_up, t.up_index, 1))
    pre_norm, post_norm = _norms(t)
    # What the output was multiplied by: where its gradient is asked for, it is <dy', output>.
    has_dot = t.gate_weight is not None or needs["gate"] or needs["scale"]
    dot_of = (t.scale if value is None else value) if has_dot else None
    grads: dict[str, Value] = {}
    dot: Tensor | None
    if post_norm is not None:
        norm = (*post_norm, at["post_norm_eps"])
        da, dot = _up_backward_normed(needs, grads, dropped, a, up_rows, norm, factor, dot_of)
    else:
        da, dot = _up_backward(needs, grads, dropped, a, up_rows, factor, dot_of)
    for name, bank in (("w_up", t.w_up), ("b_up", t.b_up)):
        if bank is not None and needs[name]:
            grads[name] = member_grad(grads[name], bank, t.up_index)

    dlogit: Tensor | None = None
    if value is not None and dot is not None:
        if dot.ndim > value.ndim:
            dot = dot.sum(1)
        dgate = _times(dot, at["scale_value"])
        if t.scale is not None:
            dgate = dgate * t.scale.to(acc)
        if t.gate_weight is not None:
            gates = quick_row_gates(x, t.gate_weight, t.gate_bias)
            dlogit = pool_backward(dgate, gates, at["pooling"], t.mask)
            grads["gate_bias"] = cast(dlogit.sum().view(1), t.gate_bias.dtype)
        else:
            grads["gate"] = dgate.to(value.dtype)
        dot = dot if t.scale is None else dot * value
    if t.scale is not None and dot is not None:
        grads["scale"] = (dot.sum() * at["scale_value"]).to(t.scale.dtype)

    dh = _activation_backward(at["activation"], da, h)
    down = member(t.w_down, t.down_index, 2)
    if t.b_down is not None and needs["b_down"]:
        sums = bias_grad(dh, down.ndim == 3, t.b_down.dtype)  # which adds in float32 all the same
        grads["b_down"] = member_grad(sums, t.b_down, t.down_index)
    before = None if pre_norm is None else (*pre_norm, at["pre_norm_eps"])
    dx, dw_down = _down_backward(needs, grads, x, dh, down, before, dlogit, t.gate_weight)
    if dw_down is not None:
        grads["w_down"] = member_grad(dw_down, t.w_down, t.down_index)
    _put_norms_in_banks(grads, needs, t)
    grads["x"] = dx.add_(dy) if dx is not None and at["residual_from"] == "input" else dx
    return {name: grads[name] for name, need in needs.items() if need}


def _norms(t: SimpleNamespace) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]:
    """Weight and bias of the norm before and of the norm after, of the members that are picked:
    [D] for all rows or [B, D]; None without one.
    """
    before = after = None
    if t.pre_norm_weight is not None:
        weight, bias, index = t.pre_norm_weight, t.pre_norm_bias, t.down_index
        before = member(weight, index, 1), member(bias, index, 1)
    if t.post_norm_weight is not None:
        weight, bias, index = t.post_norm_weight, t.post_norm_bias, t.up_index
        after = member(weight, index, 1), member(bias, index, 1)
    return before, after


def _put_norms_in_banks(
    grads: dict[str, Value], needs: dict[str, bool], t: SimpleNamespace
) -> None:
    """Makes the gradients of the norms' members those of their banks."""
    for norm, index in (("pre_norm", t.down_index), ("post_norm", t.up_index)):
        for name in (f"{norm}_weight", f"{norm}_bias"):
            bank = getattr(t, name)
            if bank is not None and bank.ndim == 2 and needs[name]:
                grads[name] = member_grad(grads[name], bank, index)


def _dropout(chosen: Chosen, seed: int, like: Tensor) -> Tensor:
    at = chosen.attributes
    rows = like.shape[0] * like.shape[1]
    return dropout_factor(rows, like.shape[2], at["dropout_p"], seed, like).view_as(like)


def _factor(chosen: Chosen, scale: Tensor | None, gate: Tensor | None) -> Tensor | float:
    """scale · g: a number, or a tensor that multiplies [B, S, D], rounded to its dtype; 0 where the
    gate is below `skip_below`.
    """
    at, acc = chosen.attributes, accumulator(chosen.dtype)
    number: float = at["scale_value"]
    if scale is None and gate is None:
        return number
    factor = torch.ones((), dtype=acc, device=chosen.device) if scale is None else scale.to(acc)
    if gate is not None:
        rows = cast(over_rows(gate), acc)
        factor = rows if scale is None else factor * rows
        if at["skip_below"] > NEVER_SKIP:
            factor = factor * (over_rows(gate) >= at["skip_below"])
    factor = factor if number == 1.0 else factor * number
    return cast(factor.view(1, 1, 1) if gate is None else factor, chosen.dtype)


def _added(residual: Tensor | None, u: Tensor, factor: Tensor | float) -> Tensor:
    """residual + factor · u, written over u."""
    if isinstance(factor, Tensor):
        return u.mul_(factor) if residual is None else torch.addcmul(residual, u, factor, out=u)
    if residual is None:
        return u if factor == 1.0 else u.mul_(factor)
    return torch.add(residual, u, alpha=factor, out=u)


def _times(rows: Tensor, factor: Tensor | float) -> Tensor:
    """factor · rows; the rows themselves if it is 1."""
    return rows if isinstance(factor, float) and factor == 1.0 else rows * factor


def _up_backward(
    needs: dict[str, bool],
    grads: dict[str, Value],
    dropped: Tensor,
    a: Tensor,
    up_rows: tuple[Tensor, Tensor | None],
    factor: Tensor | float,
    dot_of: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """da, and <dy', W_up a + b_up> for each element of the gate ``dot_of``; adds the gradients of
    the up projection's members to ``grads``.
    """
    acc, (up, bias) = accumulator(a.dtype), up_rows
    is_per_row = dot_of is not None and dot_of.ndim == 2
    v = dropped @ cast(up, a.dtype)
    if needs["w_up"]:
        grads["w_up"] = weight_grad(dropped, _times(a, factor), up.ndim == 3)
    dot: Tensor | None = None
    if dot_of is not None:
        dot = (cast(v, acc) * cast(a, acc)).sum(-1 if is_per_row else (1, 2))
    if bias is not None and (needs["b_up"] or dot is not None):
        if is_per_row and dot is not None and isinstance(factor, Tensor):
            dot = dot + (dropped @ cast(bias, a.dtype)[..., None])[..., 0]
            by_sample = (factor.transpose(1, 2) @ dropped)[:, 0].to(acc)
        else:
            sums = cast(dropped.sum(1), acc)
            if dot is not None:
                shift = cast(bias, acc)
                dot = dot + (sums @ shift if bias.ndim == 1 else (sums * shift).sum(-1))
            by_sample = sums * factor.view(-1, 1) if isinstance(factor, Tensor) else sums * factor
        grads["b_up"] = by_sample if bias.ndim == 2 else by_sample.sum(0)
    return _times(v, factor), dot


def _up_backward_normed(
    needs: dict[str, bool],
    grads: dict[str, Value],
    dropped: Tensor,
    a: Tensor,
    up_rows: tuple[Tensor, Tensor | None],
    norm: tuple[Tensor, Tensor, float],
    factor: Tensor | float,
    dot_of: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """The same with a post-norm, whose input is made again; its dot is of each row."""
    acc, (up, bias), (weight, shift, eps) = accumulator(a.dtype), up_rows, norm
    u = linear(a, up, bias)
    normed, mean, rstd = _norm(u, weight, shift, eps)
    dot = None if dot_of is None else (dropped * normed).sum(-1).to(acc)
    du, grads["post_norm_weight"], grads["post_norm_bias"] = _norm_backward(
        _times(dropped, factor), u, mean, rstd, weight, shift
    )
    if needs["w_up"]:
        grads["w_up"] = weight_grad(du, a, up.ndim == 3)
    if bias is not None and needs["b_up"]:
        grads["b_up"] = bias_grad(du, up.ndim == 3, acc)
    return du @ cast(up, a.dtype), dot


def _down_backward(
    needs: dict[str, bool],
    grads: dict[str, Value],
    x: Tensor,
    dh: Tensor,
    down: Tensor,
    norm: tuple[Tensor, Tensor, float] | None,
    dlogit: Tensor | None,
    gate_weight: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """dx without the residual's part, and the gradient of the down projection's members."""
    down, r = cast(down, x.dtype), dh.shape[-1]
    dx = dw_down = None
    if norm is None and down.ndim == 2 and dlogit is not None and gate_weight is not None:
        # The gate as one more row of the down projection. Products of 16 bits prefer a depth that
        # is a multiple of 4, so rows of 0 are added, and whatever stands beside them.
        more = 1 if x.dtype == dlogit.dtype else 4 - r % 4
        column = cast(dlogit, x.dtype).unsqueeze(-1)
        wide = torch.cat([dh, column.expand(-1, -1, more)], -1)
        rows = torch.cat(
            [down, cast(gate_weight, x.dtype)[None], down.new_zeros(more - 1, x.shape[-1])]
        )
        if needs["x"]:
            dx = wide @ rows
        if needs["w_down"] or needs["gate_weight"]:
            both = weight_grad(wide, x, False)
            dw_down = both[:r]
            grads["gate_weight"] = both[r].to(gate_weight.dtype, copy=True)
        return dx, dw_down
    z = x
    if norm is not None:
        z, mean, rstd = _norm(x, *norm)
    if needs["w_down"]:
        dw_down = weight_grad(dh, z, down.ndim == 3)
    if norm is not None:
        dx, grads["pre_norm_weight"], grads["pre_norm_bias"] = _norm_backward(
            dh @ down, x, mean, rstd, *norm[:2]
        )
    elif needs["x"]:
        dx = dh @ down
    if dlogit is not None and gate_weight is not None:
        by_row = dlogit.to(x.dtype).flatten()
        if dx is not None:
            dx.view(-1, x.shape[-1]).addr_(by_row, gate_weight.to(x.dtype))
        grads["gate_weight"] = (by_row @ x.flatten(0, 1)).to(gate_weight.dtype)
    return dx, dw_down


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """`layer_norm` with the rows' means and 1 / standard deviations [B, S, 1]."""
    if weight.ndim == 1:
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_layer_norm(
            x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps
        )
        return found
    wide = x.to(accumulator(x.dtype))
    _, mean, rstd = torch.ops.aten.native_layer_norm(wide, x.shape[-1:], None, None, eps)
    return layer_norm(x, weight, bias, eps), mean, rstd


def _norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, and the gradients of weight and bias, of each sample where it has its own [B, D]."""
    if weight.ndim == 2:
        acc = accumulator(x.dtype)
        wide, hat = dy.to(acc), (x.to(acc) - mean) * rstd
        dx, _, _ = torch.ops.aten.native_layer_norm_backward(
            wide * weight.to(x.dtype).to(acc)[:, None], x.to(acc), x.shape[-1:], mean, rstd,
            None, None, [True, False, False],
        )  # fmt: skip
        # The parameters' gradients are rounded when they are in their banks.
        return dx.to(x.dtype), (wide * hat).sum(1), wide.sum(1)
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
        dy.contiguous(),
        x.contiguous(),
        x.shape[-1:],
        mean,
        rstd,
        weight.to(x.dtype),
        bias.to(x.dtype),
        [True, True, True],
    )
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype)


def _activation_backward(activation: str, da: Tensor, h: Tensor) -> Tensor:
    aten = torch.ops.aten
    if activation == "relu":
        return aten.threshold_backward(da, h, 0)
    if activation == "gelu":
        return aten.gelu_backward(da, h, approximate="none")
    if activation == "gelu_tanh":
        return aten.gelu_backward(da, h, approximate="tanh")
    if activation == "silu":
        return aten.silu_backward(da, h)
    if activation == "tanh":
        return aten.tanh_backward(da, torch.tanh(h))
    return da
