"""A frozen linear layer with low-rank branches, and the gates that come out of the same read of its
input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .._arguments import (
    cast_activation,
    dense,
    draw_seed,
    flag,
    fold,
    group,
    groups,
    indices_of_sides,
    number,
    whole,
)
from .._gate import LearnedGate
from .._register import Operator
from .contract import CONTRACT, reference

_operator = Operator(CONTRACT, reference)
_NAME = CONTRACT.name


class LoraBranch(NamedTuple):
    """One low-rank branch: a [R, Din], b [size, R] into the output columns from ``offset`` on."""

    a: Tensor
    b: Tensor
    offset: int = 0
    scale: float | Tensor = 1.0
    gate: Tensor | LearnedGate | None = None
    bank_index: Tensor | tuple[Tensor | None, Tensor | None] | None = None


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    branches: Sequence[LoraBranch] = (),
    *,
    transposed: bool = False,
    extra_gates: Sequence[LearnedGate] = (),
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    seed: int | None = None,
    return_gates: bool = False,
    backend: str | None = None,
) -> Any:
    """``y = x Wᵀ + b + Σ_i into columns [offset_i, offset_i + size_i): scale_i · g_i · (dropout(x)
    A_iᵀ) B_iᵀ``

    Args:
        x: [..., Din]; [T, Din] is one sequence (B = 1, S = T), more dimensions are [B, ..., Din].
        weight, bias: [Dout, Din], or [Din, Dout] with ``transposed`` (GPT-2's Conv1D), and [Dout].
            Frozen as a rule: one that does not require a gradient costs nothing in backward.
        branches: `LoraBranch`es over one read of x: a [R, Din] and b [size, R], or banks [M, ...]
            with an int64 index [] or [B], whose values are checked on the CPU only; R from 1 to
            256; scale is alpha / R or whatever the
            method says, or a [] tensor with a gradient, which multiplies b beforehand; gate is [B],
            [B, S] or a `LearnedGate`.
        extra_gates: `LearnedGate`s evaluated on x for other uses (a prefix's gate); they carry
            gradients.
        mask: [B, S] bool, True for real tokens; needed by the pooling ``masked_mean``.
        dropout_p, seed: dropout on the branches' input only, one mask for all of them, a function
            of the seed (Philox4x32-10) that is never stored. Without a seed one is drawn from
            torch's CPU generator.
        return_gates: also return the branches' learned gates' values, without gradient.
        backend: a backend's name; None: `use_backend`'s, else as `explain` tells.

    Returns:
        y; with ``extra_gates`` (y, their values); with ``return_gates`` (y, extra values, branch
        values, None where a branch has no learned gate). Values are float32, [B], or [B, S] for the
        pooling ``token``.

    Raises:
        ValueError: a shape, dtype, device, rank, column range or index that does not fit; a backend
            that was asked for and cannot serve the call. TypeError: an argument of another type.

    Saved for backward: x and s = dropout(x) Aᵀ [B, S, ΣR]. Papers: Hu et al. 2022 (LoRA); Mao et
        al. 2022 (UniPELT).
    """
    x = cast_activation(x)
    leading = None
    if isinstance(x, Tensor) and x.ndim not in (0, 3):
        leading = dense(_NAME, "x", x).shape[:-1]
        batch = leading[0] if len(leading) > 2 else 1
        # Not -1 for the rows: of an empty batch their number could not be told.
        rows = (leading[1:] if len(leading) > 2 else leading).numel()
        x = x.reshape(batch, rows, x.shape[-1])
    dropout_p = number(_NAME, "dropout_p", dropout_p)
    extra_gates = groups(_NAME, "extra_gates", extra_gates, LearnedGate)
    a, b, a_index, b_index, gate, gate_weight, gate_bias, offsets, scales, poolings = _columns(
        groups(_NAME, "branches", branches, LoraBranch)
    )
    values = (
        x, weight, bias, a, b, a_index, b_index, gate, gate_weight, gate_bias,
        [gate.weight for gate in extra_gates], [gate.bias for gate in extra_gates], mask,
    )  # fmt: skip
    extra_poolings = [gate.pooling for gate in extra_gates]
    is_transposed = flag(_NAME, "transposed", transposed)
    attributes = (is_transposed, offsets, scales, poolings, extra_poolings, dropout_p)
    y, extras, gate_values = _operator(
        values, attributes, draw_seed(_NAME, dropout_p, seed), backend
    )
    if leading is not None:
        y = y.reshape(*leading, y.shape[-1])
    if flag(_NAME, "return_gates", return_gates):
        branch_values = (v if p != "none" else None for v, p in zip(gate_values, poolings))
        return y, tuple(extras), tuple(branch_values)
    return (y, tuple(extras)) if extra_gates else y


def _columns(branches: Sequence[LoraBranch]) -> Any:
    """The branches' fields, a list for each: a, b, a_index, b_index, gate, gate_weight, gate_bias,
    offset, scale, pooling.
    """
    if not branches:
        return [[] for _ in range(10)]
    return map(list, zip(*[_fields(branch) for branch in branches]))


def _fields(branch: LoraBranch) -> tuple[Any, ...]:
    a, b, offset, scale, gate, index = branch
    a_index, b_index = indices_of_sides(_NAME, "a branch's bank_index", index, a, b)
    offset = whole(_NAME, "a branch's offset", offset)
    scale, (b,) = fold(_NAME, "a branch's scale", scale, b)
    if isinstance(gate, LearnedGate):
        weight, bias, pooling = group(_NAME, "a branch's gate", gate, LearnedGate)
        return a, b, a_index, b_index, None, weight, bias, offset, scale, pooling
    return a, b, a_index, b_index, gate, None, None, offset, scale, "none"
