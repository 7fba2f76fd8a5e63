"""Linears whose weight another library keeps in a few bits: they are called, and never read.

bitsandbytes' have a class of their own; torchao's are an nn.Linear with a weight of a tensor class
of its own. Neither library is imported here: whoever has such a Linear has loaded it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

_BITSANDBYTES = ("Linear4bit", "Linear8bitLt")


def is_quantised(module: nn.Module) -> bool:
    """Whether a module is a Linear of bitsandbytes' or torchao's, in 4 or 8 bits."""
    return _is_of_bitsandbytes(module) or _is_of_torchao(module)


def why_no_gradient(module: nn.Module) -> str:
    """Empty where a gradient passes a quantised Linear, else what it is and the way out, as the
    rest of a sentence.
    """
    if _is_of_bitsandbytes(module):
        is_packed = getattr(module.weight, "quant_state", None) is not None
        if is_packed or module.weight.dtype == torch.int8:
            return ""
        return (
            f"{type(module).__name__} of bitsandbytes with a weight of {module.weight.dtype}, "
            "which is not quantised yet; move it to its device (in 8 bits: "
            "has_fp16_weights=False)"
        )
    if not _passes_gradient(module):
        kind = type(module.weight).__name__
        return (
            f"a weight of torchao's {kind}, whose product gives its input no gradient; use "
            "another of torchao's configs, such as Int8WeightOnlyConfig"
        )
    return ""


def entries(parameter: Tensor) -> int:
    """How many numbers a parameter stands for: one of 4 bits holds two or more in each element."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def _is_of_bitsandbytes(module: nn.Module) -> bool:
    defining: Any = sys.modules.get("bitsandbytes.nn")
    return defining is not None and isinstance(
        module, tuple(getattr(defining, name) for name in _BITSANDBYTES)
    )


def _is_of_torchao(module: nn.Module) -> bool:
    defining: Any = sys.modules.get("torchao.utils")
    weight = module._parameters.get("weight")
    is_linear = defining is not None and isinstance(module, nn.Linear)
    return is_linear and isinstance(weight, defining.TorchAOBaseTensor)


def _passes_gradient(module: nn.Module) -> bool:
    """Whether a call of a Linear is differentiable, tried on one row."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    x = torch.zeros(1, weight.shape[1], dtype=weight.dtype).to(weight.device)
    with torch.enable_grad():
        y = nn.functional.linear(x.requires_grad_(), weight)
        if not y.requires_grad:
            return False
        (dx,) = torch.autograd.grad(y.sum(), x, allow_unused=True)
    return dx is not None
