"""The symmetric Kullback-Leibler divergence of two forward passes: AdaMix's consistency loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .._arguments import dense
from .._register import Operator
from .contract import CONTRACT, reference

_operator = Operator(CONTRACT, reference)
_NAME = CONTRACT.name


def symmetric_kl(
    z1: Tensor, z2: Tensor, mask: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """``mean over rows of 0.5 [ KL(p2 ‖ p1) + KL(p1 ‖ p2) ]`` with ``p = softmax(z)``

    The gradient treats the target of each divergence as a constant, as the papers' code does:
    ``dz1 = 0.5 (p1 - p2) / count`` and ``dz2 = 0.5 (p2 - p1) / count``. It is not the derivative of
    the value.

    Args:
        z1, z2: logits [..., C] of the same shape; float32, float16 or bfloat16 (float64: eager
            only). The softmax is in float32. With C = 1 (a regression) the loss and its gradient
            are 0.
        mask: bool, the shape of z1 without C: rows that count (an LM's target tokens); None: all.
        backend: a backend's name; None: `use_backend`'s, else as `explain` tells.

    Returns:
        float32 []; 0 where no row counts.

    Raises:
        ValueError: a shape, dtype or device that does not fit; a backend that was asked for and
            cannot serve the call. TypeError: an argument of another type.

    Saved for backward: z1, z2 and their log-sum-exps [2, T]. Paper: Wang et al. 2022 (AdaMix).
    """
    if isinstance(z1, Tensor) and isinstance(z2, Tensor) and z1.ndim != 2:
        z1, z2, mask = _flat(z1, z2, mask)
    (loss,) = _operator((z1, z2, mask), (), 0, backend)
    return loss


def _flat(z1: Tensor, z2: Tensor, mask: Any) -> tuple[Tensor, Tensor, Any]:
    """Logits [T, C] and mask [T], where their shapes go together."""
    for name, value in (("z1", z1), ("z2", z2), ("mask", mask)):
        dense(_NAME, name, value)
    if not z1.ndim:
        raise ValueError("symmetric_kl: expected z1[..., C] with at least one size, got []")
    if z1.shape != z2.shape:
        return z1, z2, mask  # the contract reports it
    if isinstance(mask, Tensor):
        if mask.shape != z1.shape[:-1]:
            raise ValueError(
                f"symmetric_kl: expected mask {list(z1.shape[:-1])} (z1 without its last size), got"
                f" {list(mask.shape)}"
            )
        mask = mask.reshape(-1)
    z1, z2 = (z[None] if z.ndim == 1 else z.flatten(0, -2) for z in (z1, z2))
    return z1, z2, mask
