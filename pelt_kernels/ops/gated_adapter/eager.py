"""gated_adapter composed of PyTorch operations, with the closed form of its gradient.

Backward keeps x and h only. With v = dy' W_up (dy' = dy after dropout), the gate's gradient needs
no up projection again: ``<dy', W_up a + b_up> = <v, a> + <dy', b_up>``; with a post-norm the
    adapter's output is recomputed from h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._bank import bias_grad, linear, member, member_grad, weight_grad
from .._contract import Call, Value
from .._gate import accumulator, over_rows, pool, pool_backward, row_gates
from .._philox import dropout_factor
from .contract import ACTIVATIONS, NEVER_SKIP, layer_norm


def supports(call: Call) -> str:
    """PyTorch serves every call."""
    return ""


def forward(
    call: Call,
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
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, S, D], the learned gate's value (or [0]), and h [B, S, R] for backward."""
    at = call.attributes
    z = x
    if pre_norm_weight is not None and pre_norm_bias is not None:
        z = layer_norm(x, pre_norm_weight, pre_norm_bias, at["pre_norm_eps"])
    h = linear(z, member(w_down, down_index, 2), member(b_down, down_index, 1))
    u = linear(
        ACTIVATIONS[at["activation"]](h), member(w_up, up_index, 2), member(b_up, up_index, 1)
    )
    if post_norm_weight is not None and post_norm_bias is not None:
        u = layer_norm(u, post_norm_weight, post_norm_bias, at["post_norm_eps"])
    if at["dropout_p"]:
        u = u * _dropout(call, seed, u)
    gate_value = x.new_empty(0, dtype=accumulator(x.dtype))
    if gate_weight is not None and gate_bias is not None:
        gate = gate_value = pool(row_gates(x, gate_weight, gate_bias), at["pooling"], mask)
    y = u * _factor(call, scale, gate).to(x.dtype)
    if at["residual_from"] != "none":
        y = y + (x if residual is None else residual)
    return y.contiguous(), gate_value, h.contiguous()


def backward(
    call: Call,
    needs: dict[str, bool],
    dy: Tensor,
    gate_value: Tensor,
    h: Tensor,
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
    seed: int,
) -> dict[str, Value]:
    """The gradients that ``needs`` names, by input name."""
    at, acc, grads = call.attributes, accumulator(x.dtype), {}
    value = gate if gate_weight is None else gate_value
    up = member(w_up, up_index, 2)
    up_bias = member(b_up, up_index, 1)
    per_sample_up = up.ndim == 3
    a = ACTIVATIONS[at["activation"]](h)
    factor = _factor(call, scale, value)
    dropped = dy * _dropout(call, seed, dy) if at["dropout_p"] else dy
    du = dropped * factor.to(x.dtype)

    if post_norm_weight is not None and post_norm_bias is not None:
        u = linear(a, up, up_bias)
        normed, mean, rstd = torch.ops.aten.native_layer_norm(
            u,
            u.shape[-1:],
            post_norm_weight.to(u.dtype),
            post_norm_bias.to(u.dtype),
            at["post_norm_eps"],
        )
        row_dot = (dropped.to(acc) * normed).sum(-1)
        du, grads["post_norm_weight"], grads["post_norm_bias"] = _norm_backward(
            du, u, mean, rstd, post_norm_weight, post_norm_bias
        )
        da = du @ up.to(x.dtype)
    else:
        da = dropped @ up.to(x.dtype)
        row_dot = (da.to(acc) * a).sum(-1)
        if up_bias is not None:
            row_dot = row_dot + (dropped.to(acc) @ up_bias.to(acc)[..., None])[..., 0]
        da = da * factor.to(x.dtype)

    if needs["w_up"]:
        grads["w_up"] = member_grad(weight_grad(du, a, per_sample_up), w_up, up_index)
    if b_up is not None and needs["b_up"]:
        grads["b_up"] = member_grad(bias_grad(du, per_sample_up, acc), b_up, up_index)

    dh = _activation_backward(at["activation"], da, h)
    down = member(w_down, down_index, 2)
    per_sample_down = down.ndim == 3
    z = x
    if pre_norm_weight is not None and pre_norm_bias is not None:
        z, mean, rstd = torch.ops.aten.native_layer_norm(
            x,
            x.shape[-1:],
            pre_norm_weight.to(x.dtype),
            pre_norm_bias.to(x.dtype),
            at["pre_norm_eps"],
        )
    if needs["w_down"]:
        grads["w_down"] = member_grad(weight_grad(dh, z, per_sample_down), w_down, down_index)
    if b_down is not None and needs["b_down"]:
        grads["b_down"] = member_grad(bias_grad(dh, per_sample_down, acc), b_down, down_index)
    dx = dh @ down.to(x.dtype)
    if pre_norm_weight is not None and pre_norm_bias is not None:
        dx, grads["pre_norm_weight"], grads["pre_norm_bias"] = _norm_backward(
            dx, x, mean, rstd, pre_norm_weight, pre_norm_bias
        )
    if at["residual_from"] == "input":
        dx = dx + dy

    scale_number = at["scale_value"] * (1.0 if scale is None else scale.to(acc))
    if value is not None:
        dgate = row_dot * scale_number if value.ndim == 2 else (row_dot * scale_number).sum(1)
        if gate_weight is not None and gate_bias is not None:
            gates = row_gates(x, gate_weight, gate_bias)
            dlogit = pool_backward(dgate, gates, at["pooling"], mask)
            dx = (dx + dlogit[..., None] * gate_weight.to(x.dtype)).to(x.dtype)
            grads["gate_weight"] = torch.einsum("bs,bsd->d", dlogit, x.to(acc)).to(
                gate_weight.dtype
            )
            grads["gate_bias"] = dlogit.sum().reshape(1).to(gate_bias.dtype)
        else:
            grads["gate"] = dgate.to(value.dtype)
        row_dot = row_dot * (value[:, None] if value.ndim == 1 else value)
    if scale is not None:
        grads["scale"] = (row_dot.sum() * at["scale_value"]).to(scale.dtype)
    grads["x"] = dx
    return {name: _contiguous(grads.get(name)) for name, need in needs.items() if need}


def _contiguous(grad: Value) -> Value:
    return None if grad is None else grad.contiguous()


def _dropout(call: Call, seed: int, like: Tensor) -> Tensor:
    at = call.attributes
    rows = like.shape[0] * like.shape[1]
    return dropout_factor(rows, like.shape[2], at["dropout_p"], seed, like).view_as(like)


def _factor(call: Call, scale: Tensor | None, gate: Tensor | None) -> Tensor:
    """scale · g, broadcastable over [B, S, D], in the accumulator dtype; 0 where the gate is below
    `skip_below`.
    """
    at, acc = call.attributes, accumulator(call.dtype)
    factor = torch.full((1, 1, 1), at["scale_value"], dtype=acc, device=call.device)
    if scale is not None:
        factor = factor * scale.to(acc)
    if gate is not None:
        factor = factor * over_rows(gate).to(acc)
        if at["skip_below"] > NEVER_SKIP:
            factor = factor * (over_rows(gate) >= at["skip_below"])
    return factor


def _norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
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
