"""A frozen weight with a low-rank update, pruned to an exact count of entries by learned scores."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import fold, whole
from .._register import Operator
from .contract import CONTRACT, kept_entries, reference

__all__ = ["kept_entries", "masked_weight"]

_operator = Operator(CONTRACT, reference)
_NAME = CONTRACT.name


def masked_weight(
    w0: Tensor,
    u: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    row: Tensor,
    col: Tensor,
    keep: int,
    *,
    beta: float | Tensor = 1.0,
    alpha1: float | Tensor = 1.0,
    alpha2: float | Tensor = 1.0,
    backend: str | None = None,
) -> Tensor:
    """``mask ⊙ W`` with ``W = w0 + beta · u v`` and mask = 1 at the ``keep`` highest scores ``|W| +
    alpha1 · a b + alpha2 · (row 1ᵀ + 1 colᵀ)``

    Exactly ``keep`` entries stay. Among equal scores those of the lowest flat (row-major) index
    stay; a NaN counts as the highest score. Scores are computed in float32 from the parameters as
    they are, so 16-bit weights do not make ties of them.

    Gradients are straight-through: the mask passes the gradient that reaches it to the scores. With
    G the gradient of the result, ``dW = G ⊙ (mask + |W|)`` and ``dscore = G ⊙ W``, from which those
    of the factors follow; the entries that are pruned learn too.

    A factor of 0 leaves its term out: nothing of u, v, a, b, row or col is read for it, and their
    gradients are 0.

    Args:
        w0: [Dout, Din]; float32, float16 or bfloat16 (float64: eager only).
        u, v: [Dout, R] and [R, Din]. a, b: [Dout, R2] and [R2, Din]. row, col: [Dout] and [Din].
            Parameters have w0's dtype, or float32 beside 16-bit weights.
        keep: how many entries stay, 0 to Dout · Din; `kept_entries` gives it for a sparsity.
        beta, alpha1, alpha2: factors; a [] tensor has a gradient, and multiplies u, a, or row and
            col beforehand.
        backend: a backend's name; None: `use_backend`'s, else as `explain` tells.

    Returns:
        [Dout, Din] in w0's dtype; pruned entries are 0.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit; a backend that was asked for
            and cannot serve the call. TypeError: an argument of another type.

    Saved for backward: the inputs and the mask [Dout, Din], one byte an entry. Paper: Li et al.
    2022 (PST).
    """
    keep = whole(_NAME, "keep", keep)
    beta, (u,) = fold(_NAME, "beta", beta, u)
    alpha1, (a,) = fold(_NAME, "alpha1", alpha1, a)
    alpha2, (row, col) = fold(_NAME, "alpha2", alpha2, row, col)
    values = (w0, u, v, a, b, row, col)
    attributes = (keep, beta, alpha1, alpha2)
    if not all(attributes[1:]):
        CONTRACT.bind(values, attributes)  # before it sees less of them
        u, v = (u, v) if beta else (u[:, :0], v[:0])
        a, b = (a, b) if alpha1 else (a[:, :0], b[:0])
        row, col = (row, col) if alpha2 else (_zeros(row), _zeros(col))
        values = (w0, u, v, a, b, row, col)
    (y,) = _operator(values, attributes, 0, backend)
    return y


def _zeros(like: Tensor) -> Tensor:
    """Zeros that have gradients, of 0 as well, and read nothing."""
    return torch.nn.functional.pad(like[:0], (0, len(like)))
