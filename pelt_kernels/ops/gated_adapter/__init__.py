"""The gated bottleneck adapter: one operator for UniPELT's, AdaMix's, VLM's and HyperPELT's
adapters.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._arguments import (
    cast_activation,
    dense,
    draw_seed,
    flag,
    group,
    indices_of_sides,
    number,
    refuse,
)
from .._gate import LearnedGate
from .._register import Operator
from .contract import CONTRACT, NEVER_SKIP, reference

_operator = Operator(CONTRACT, reference)
_NAME = CONTRACT.name


class Norm(NamedTuple):
    """A LayerNorm's parameters: weight [D], bias [D], or banks [M, D] of both; eps."""

    weight: Tensor
    bias: Tensor
    eps: float = 1e-5


def gated_adapter(
    x: Tensor,
    w_down: Tensor,
    w_up: Tensor,
    *,
    b_down: Tensor | None = None,
    b_up: Tensor | None = None,
    bank_index: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
    activation: str = "relu",
    pre_norm: Norm | None = None,
    post_norm: Norm | None = None,
    scale: float | Tensor = 1.0,
    gate: Tensor | LearnedGate | None = None,
    mask: Tensor | None = None,
    residual: str | Tensor | None = "input",
    dropout_p: float = 0.0,
    seed: int | None = None,
    skip_below: float | None = None,
    return_gate: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor | None]:
    """``y = residual + scale · g · dropout(post_norm(W_up φ(W_down pre_norm(x) + b_down) + b_up))``

    Args:
        x: [B, S, D], or [T, D] which is one sequence (B = 1, S = T); float32, float16 or bfloat16
            (float64: eager only). A last stride other than 1 is made contiguous by the native
            backends.
        w_down, b_down: [R, D] and [R], or banks [M, R, D] and [M, R]. Parameters have x's dtype, or
            float32 beside 16-bit activations; then they are rounded to it for the products and
            their gradients are float32.
        w_up, b_up: [D, R] and [D], or banks [M_up, D, R] and [M_up, D].
        bank_index: int64 [] (one member for the batch) or [B] (one for each sample), for both
            projections, or a pair (for w_down and pre_norm, for w_up and post_norm). On a GPU its
            values are not checked, which would stop the stream: one outside of the bank picks the
            nearest member.
        activation: φ: relu, gelu (erf), gelu_tanh, silu, tanh or identity, on h = W_down
            pre_norm(x) + b_down.
        pre_norm, post_norm: `Norm` on x (VLM) or on the adapter's output (HyperPELT). Beside a bank
            w_down pre_norm may be a bank [M, D], whose member is the one of w_down, and post_norm
            [M_up, D] beside a bank w_up: with an index [B] one batch mixes tasks.
        scale: a number, or a [] tensor with a gradient.
        gate: [B] or [B, S], or `LearnedGate` g = pool(sigmoid(w · x_t + b)).
        mask: [B, S] bool, True for real tokens; needed by the pooling ``masked_mean``.
        residual: "input" (x), None, or a tensor [B, S, D].
        dropout_p, seed: dropout on the adapter's output before the gate. The mask is a function of
            the seed (Philox4x32-10), so none is stored. Without a seed one is drawn from torch's
            CPU generator.
        skip_below: inference only: a row whose gate is below it gives its residual untouched.
        return_gate: also return the learned gate's value, float32, [B] ([B, S] for ``token``); None
            without one. It carries no gradient.
        backend: a backend's name; None: `use_backend`'s, else as `explain` tells.

    Returns:
        y like x, or (y, gate value).

    Raises:
        ValueError: a shape, dtype, device, choice or index that does not fit; `skip_below` where a
            gradient is wanted; a backend that was asked for and cannot serve the call. TypeError:
            an argument of another type.

    Saved for backward: x, h [B, S, R] and the gate's value. Papers: Houlsby et al. 2019; Mao et al.
    2022 (UniPELT); Wang et al. 2022 (AdaMix); Lin et al. 2020 (VLM); Zhang et al. 2022 (HyperPELT).
    """
    is_flat = isinstance(x, Tensor) and x.ndim == 2
    x = cast_activation(dense(_NAME, "x", x)[None] if is_flat else x)
    learned = group(_NAME, "gate", gate, LearnedGate) if isinstance(gate, LearnedGate) else None
    down_index, up_index = indices_of_sides(_NAME, "bank_index", bank_index, w_down, w_up)
    before = None if pre_norm is None else group(_NAME, "pre_norm", pre_norm, Norm)
    after = None if post_norm is None else group(_NAME, "post_norm", post_norm, Norm)
    dropout_p = number(_NAME, "dropout_p", dropout_p)
    residual_from, residual_tensor = _residual(residual, is_flat)
    if (
        skip_below is not None
        and torch.is_grad_enabled()
        and _wants_grad(x, w_down, w_up, scale, gate)
    ):
        raise ValueError(
            "gated_adapter: expected skip_below only without gradients (it is for inference), got"
            " inputs that require one; call it under torch.no_grad()"
        )
    scale_tensor = scale if isinstance(scale, Tensor) else None
    values = (
        x, w_down, b_down, w_up, b_up, down_index, up_index,
        None if before is None else before.weight, None if before is None else before.bias,
        None if after is None else after.weight, None if after is None else after.bias,
        scale_tensor, None if learned else gate,
        learned.weight if learned else None, learned.bias if learned else None,
        mask, residual_tensor,
    )  # fmt: skip
    attributes = (
        activation, learned.pooling if learned else "none", residual_from,
        1.0 if scale_tensor is not None else number(_NAME, "scale", scale),
        1e-5 if before is None else number(_NAME, "pre_norm.eps", before.eps),
        1e-5 if after is None else number(_NAME, "post_norm.eps", after.eps),
        dropout_p, NEVER_SKIP if skip_below is None else number(_NAME, "skip_below", skip_below),
    )  # fmt: skip
    y, gate_value = _operator(values, attributes, draw_seed(_NAME, dropout_p, seed), backend)
    y = y[0] if is_flat else y
    return (y, gate_value if learned else None) if flag(_NAME, "return_gate", return_gate) else y


def _residual(residual: str | Tensor | None, is_flat: bool) -> tuple[str, Tensor | None]:
    if residual is None:
        return "none", None
    if isinstance(residual, Tensor):
        return "tensor", cast_activation(
            dense(_NAME, "residual", residual)[None] if is_flat else residual
        )
    if not isinstance(residual, str):
        raise refuse(_NAME, "residual", "'input', None or a torch.Tensor", residual)
    if residual != "input":
        raise ValueError(
            f"gated_adapter: expected residual 'input', None or a tensor, got {residual!r}"
        )
    return "input", None


def _wants_grad(*values: object) -> bool:
    for value in values:
        if isinstance(value, tuple):
            if _wants_grad(*value):
                return True
        elif isinstance(value, Tensor) and value.requires_grad:
            return True
    return False
