"""A frozen linear layer with low-rank branches, and the gates that come out of the same read of its
input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .._autocast import cast_activation
from .._gate import LearnedGate
from .._register import Operator
from .._seed import draw_seed
from .contract import CONTRACT

_operator = Operator(CONTRACT)


class LoraBranch(NamedTuple):
    """One low-rank branch: a [R, Din], b [size, R] into the output columns from ``offset`` on."""

    a: Tensor
    b: Tensor
    offset: int = 0
    scale: float = 1.0
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
            with an int64 index [] or [B]; R from 1 to 256; scale is alpha / R or whatever the
            method says; gate is [B], [B, S] or a `LearnedGate`.
        extra_gates: `LearnedGate`s evaluated on x for other uses (a prefix's gate); they carry
            gradients.
        mask: [B, S] bool, True for real tokens; needed by the pooling ``masked_mean``.
        dropout_p, seed: dropout on the branches' input only, one mask for all of them, a function
            of the seed (Philox4x32-10) that is never stored. Without a seed one is drawn from
            torch's CPU generator.
        return_gates: also return the branches' learned gates' values, without gradient.
        backend: a backend's name; None: `use_backend`'s, else the first able one.

    Returns:
        y; with ``extra_gates`` (y, their values); with ``return_gates`` (y, extra values, branch
        values, None where a branch has no learned gate). Values are float32, [B], or [B, S] for the
        pooling ``token``.

    Raises:
        ValueError: a shape, dtype, device, rank, column range or index that does not fit; a backend
            that was asked for and cannot serve the call. TypeError: not a tensor where one is
            needed.

    Saved for backward: x and s = dropout(x) Aᵀ [B, S, ΣR]. Papers: Hu et al. 2022 (LoRA); Mao et
        al. 2022 (UniPELT).
    """
    x = cast_activation(x)
    leading = x.shape[:-1] if isinstance(x, Tensor) else ()
    if len(leading) != 2 and isinstance(x, Tensor):
        x = x.reshape(leading[0] if len(leading) > 2 else 1, -1, x.shape[-1])
    learned = [branch.gate if isinstance(branch.gate, LearnedGate) else None for branch in branches]
    indices = [_indices(branch) for branch in branches]
    values = (
        x, weight, bias,
        [branch.a for branch in branches], [branch.b for branch in branches],
        [index[0] for index in indices], [index[1] for index in indices],
        [None if gate else branch.gate for branch, gate in zip(branches, learned)],
        [gate.weight if gate else None for gate in learned],
        [gate.bias if gate else None for gate in learned],
        [gate.weight for gate in extra_gates], [gate.bias for gate in extra_gates], mask,
    )  # fmt: skip
    attributes = (
        transposed, [branch.offset for branch in branches],
        [float(branch.scale) for branch in branches],
        [gate.pooling if gate else "none" for gate in learned],
        [gate.pooling for gate in extra_gates], dropout_p,
    )  # fmt: skip
    y, extras, gate_values = _operator(values, attributes, draw_seed(dropout_p, seed), backend)
    if len(leading) != 2:
        y = y.reshape(*leading, y.shape[-1])
    if return_gates:
        return (
            y,
            tuple(extras),
            tuple(value if gate else None for value, gate in zip(gate_values, learned)),
        )
    return (y, tuple(extras)) if extra_gates else y


def _indices(branch: LoraBranch) -> tuple[Tensor | None, Tensor | None]:
    """One index serves the sides that are banks; a pair names each side's own."""
    index = branch.bank_index
    if isinstance(index, tuple):
        return index
    return (index if branch.a.ndim == 3 else None), (index if branch.b.ndim == 3 else None)
