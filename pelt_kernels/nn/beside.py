"""Low-rank branches beside a product that is given: of a Linear that has to be called, because it
has hooks, or because another library multiplies by its quantised weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional

from ..ops import LearnedGate, LoraBranch, lora_linear
from ..ops._arguments import cast_activation
from ..ops._bank import linear, member
from ..ops._gate import cast, over_rows
from ..ops._values import is_autocast


def add_branches(
    y: Tensor,
    x: Tensor,
    branches: Sequence[LoraBranch],
    extra_gates: Sequence[LearnedGate] = (),
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """``y + Σ_i into columns [offset_i, offset_i + size_i): scale_i · g_i · (dropout(x) A_iᵀ)
    B_iᵀ``

    Two products by PyTorch: with all A side by side, and with all B, which adds to y as it writes.
    Learned gates are `lora_linear`'s, which reads x once for them and, where nothing is dropped,
    for A.

    Args:
        y: the frozen layer's output [..., Dout], which is not written to. The sum has its dtype.
        x, branches, extra_gates, mask: as `lora_linear`'s; an index into a bank is [].
        dropout_p: dropout on the branches' input, by PyTorch.

    Returns:
        the sum, the values of the extra gates, and those of the branches' own without gradient
        (None of a branch without a learned gate).
    """
    off: AbstractContextManager[object] = nullcontext()
    if is_autocast(x.device):
        x, off = cast_activation(x), torch.autocast(x.device.type, enabled=False)
    with off:
        learned = [b.gate for b in branches if isinstance(b.gate, LearnedGate)]
        sides = [_sides(branch) for branch in branches]
        downs = [a for a, _ in sides]
        s, values = _narrow(x, downs, [*extra_gates, *learned], mask, dropout_p)
        extra, own = values[: len(extra_gates)], iter(values[len(extra_gates) :])
        if s is None:
            return y, extra, ()
        gates = [next(own) if isinstance(b.gate, LearnedGate) else b.gate for b in branches]
        columns = [
            _scaled(part, branch.scale, gate)
            for part, branch, gate in zip(s.split([len(a) for a in downs], -1), branches, gates)
        ]
        width = y.shape[-1]
        rows = [
            functional.pad(b.T, (branch.offset, width - branch.offset - len(b)))
            for branch, (_, b) in zip(branches, sides)
        ]
        left, right = _joined(columns, -1), _joined(rows, 0)
        total = add_product(y, cast(left, y.dtype), cast(right, y.dtype))
    own_values = [
        gate.detach() if isinstance(b.gate, LearnedGate) and gate is not None else None
        for b, gate in zip(branches, gates)
    ]
    return total, extra, tuple(own_values)


def add_product(y: Tensor, s: Tensor, rows: Tensor, scale: float = 1.0) -> Tensor:
    """``y + scale · s rows`` [..., Dout], which reads y once; s is [..., R], rows is [R, Dout]."""
    width = y.shape[-1]
    total = torch.addmm(y.reshape(-1, width), s.reshape(-1, len(rows)), rows, alpha=scale)
    return total.view(y.shape)


def _narrow(
    x: Tensor,
    downs: Sequence[Tensor],
    gates: Sequence[LearnedGate],
    mask: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor | None, tuple[Tensor, ...]]:
    """dropout(x) Aᵀ [..., ΣR] of all A [R, Din], None of none, and the gates' values."""
    a = _joined(downs, 0) if downs else None
    values: tuple[Tensor, ...] = ()
    if gates:
        x = x.flatten(1, -2) if x.ndim > 3 else x.reshape((1,) * (3 - x.ndim) + x.shape)
        # The operator wants a product: of the branches, or one of a single column.
        is_shared = a is not None and not dropout_p
        weight = a if a is not None and is_shared else gates[0].weight[None]
        s, values = lora_linear(x, weight, extra_gates=gates, mask=mask)
        if is_shared:
            return s, values
    if a is None:
        return None, values
    return linear(functional.dropout(x, dropout_p) if dropout_p else x, a, None), values


def _sides(branch: LoraBranch) -> tuple[Tensor, Tensor]:
    """A [R, Din] and B [size, R] of a branch, out of its banks."""
    index = branch.bank_index
    a_index, b_index = index if isinstance(index, tuple) else (index, index)
    return member(branch.a, a_index, 2), member(branch.b, b_index, 2)


def _scaled(s: Tensor, scale: float | Tensor, gate: Tensor | None) -> Tensor:
    """scale · g · s."""
    s = s if isinstance(scale, (int, float)) and scale == 1.0 else s * scale
    return s if gate is None else s * over_rows(gate).to(s.dtype)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)
