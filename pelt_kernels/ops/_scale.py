"""Factors that are learned: kernels take a number, so a tensor multiplies an operand beforehand."""

from __future__ import annotations

from torch import Tensor

from ._gate import accumulator


def fold(who: str, factor: float | Tensor, *operands: Tensor) -> tuple[float, tuple[Tensor, ...]]:
    """The number for the kernel and what it multiplies: of a tensor [] 1 and the operands times it,
    rounded once to their dtype, so that autograd gives the tensor its gradient.

    Raises ValueError for a tensor of several numbers; ``who`` begins the sentence.
    """
    if not isinstance(factor, Tensor):
        return float(factor), operands
    if factor.ndim:
        raise ValueError(f"{who}: expected a number or a tensor [], got {list(factor.shape)}")
    return 1.0, tuple(_times(operand, factor) for operand in operands)


def _times(operand: Tensor, factor: Tensor) -> Tensor:
    acc = accumulator(operand.dtype)
    return (operand.to(acc) * factor.to(acc)).to(operand.dtype)
