"""What decides whether a call of another library's layer goes to an operator.

These run at every call of every layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..nn.original import is_watched
from ..ops._dispatch import current_request

HALVES = (torch.float16, torch.bfloat16)


def is_cheaper_composed(elements: int, pays_from: int, backend: str | None) -> bool:
    """Whether a call costs less without an operator, and nobody asks for a backend.

    So does every call that torch.compile turns into code: it makes one pass of what is beside the
    products, and a call of an operator in its code costs more than one from Python (of PEFT's
    compiled layer it took 1.14 times the time at T = 512 and D = 384, float32, on a CPU with
    AVX-512).

    Args:
        elements: of the layer's output.
        pays_from: how many of them it takes until an operator saves more than Python's part of its
            call costs.
        backend: the one that `accelerate` was given.
    """
    if backend is not None or current_request():
        return False
    return torch.compiler.is_compiling() or elements < pays_from


def is_dense(tensor: Tensor) -> bool:
    """Not of a class that dispatches itself, such as a DTensor, nor nested or sparse."""
    return (
        (tensor.__class__ is Tensor or tensor.__class__ is nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_nested
    )


def fits(activation: Tensor, *parameters: Tensor | None) -> bool:
    """Whether an operator takes these parameters, those that there are, beside an activation: in
    its dtype, or in float32 beside a 16-bit one.
    """
    for parameter in parameters:
        if parameter is None:
            continue
        dtype = parameter.dtype
        if dtype is not activation.dtype and (
            dtype is not torch.float32 or activation.dtype not in HALVES
        ):
            return False
        if not is_dense(parameter):
            return False
    return True


def dropout_rate(dropout: nn.Module) -> float | None:
    """The rate of a dropout in this call; None where it is something else, or drops everything."""
    kind = type(dropout)
    if kind not in (nn.Identity, nn.Dropout) or is_watched(dropout):
        return None
    if kind is nn.Identity or not dropout.training:
        return 0.0
    p: float = dropout.p  # type: ignore[assignment]
    return p if p < 1.0 else None
