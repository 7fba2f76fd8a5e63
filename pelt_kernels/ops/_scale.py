"""Factors that are learned: kernels take a number, so a tensor multiplies an operand beforehand."""

from __future__ import annotations

import torch
from torch import Tensor

from ._arguments import dense, number
from ._gate import accumulator


def fold(
    operator: str, name: str, factor: float | Tensor, *operands: Tensor
) -> tuple[float, tuple[Tensor, ...]]:
    """The number for the kernel and what it multiplies: of a tensor [] 1 and the operands times it,
    rounded once to their dtype, so that autograd gives the tensor its gradient.

    Raises ValueError for another tensor than one floating number on the operands' device, and
    TypeError for what is neither tensor nor number.
    """
    if not isinstance(factor, Tensor):
        return number(operator, name, factor), operands
    dense(operator, name, factor)
    if factor.ndim or not factor.is_floating_point():
        raise ValueError(
            f"{operator}: expected {name} as a number or a tensor [], got {list(factor.shape)} in"
            f" {str(factor.dtype).removeprefix('torch.')}"
        )
    for operand in operands:
        dense(operator, f"what {name} multiplies", operand)
    devices = [operand.device for operand in operands if isinstance(operand, Tensor)]
    if len(devices) < len(operands):
        return 1.0, operands  # the operands' own rows tell
    if factor.device not in (*devices, torch.device("cpu")):
        raise ValueError(f"{operator}: expected {name} on {devices[0]}, got {factor.device}")
    return 1.0, tuple(_times(operand, factor) for operand in operands)


def default_scale(operator: str, q: Tensor) -> float:
    """Attention's 1 / sqrt(E); 1 where there is no E, which the contract refuses."""
    size = dense(operator, "q", q).shape[-1] if isinstance(q, Tensor) and q.ndim else 0
    return size**-0.5 if size else 1.0


def _times(operand: Tensor, factor: Tensor) -> Tensor:
    acc = accumulator(operand.dtype)
    return (operand.to(acc) * factor.to(acc)).to(operand.dtype)
