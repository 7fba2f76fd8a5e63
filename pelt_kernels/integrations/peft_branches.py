"""The adapters of one of PEFT's LoRA layers in one call, read from PEFT's own state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from ..nn.beside import add_product
from ..nn.original import is_plain
from .calls import dropout_rate


class Branch(NamedTuple):
    """An active adapter in one call: ``scale · (dropout(x) Aᵀ Bᵀ + bias)``."""

    a: Tensor  # [R, Din]
    b: Tensor  # [Dout, R]
    bias: Tensor | None  # [Dout]
    scale: Any  # a number, or a tensor []
    p: float


def branches_of(layer: Any, names: Iterable[str]) -> list[Branch] | None:
    """A layer's adapters among some; None where one of them computes something else."""
    # Past nn.Module's look-up of attributes, which takes a small layer as long as its products.
    modules: Any = layer._modules
    downs, ups = modules["lora_A"]._modules, modules["lora_B"]._modules
    dropouts = modules["lora_dropout"]._modules
    branches = []
    for name in names:
        if name not in downs:
            continue
        down, up, dropout = downs[name], ups[name], dropouts[name]
        p = dropout_rate(dropout)
        if (
            p is None
            or name in layer.lora_variant
            or not is_plain(down, nn.Linear)
            or not is_plain(up, nn.Linear)
        ):
            return None
        a, b = down._parameters.get("weight"), up._parameters.get("weight")
        if a is None or b is None:
            return None
        branches.append(Branch(a, b, up._parameters.get("bias"), layer.scaling[name], p))
    return branches


def added(
    y: Tensor,
    x: Tensor,
    branches: Iterable[Branch],
    *,
    in_place: bool = False,
    rounds_each: bool = False,
) -> Tensor:
    """``y + Σ scale · (dropout(x) Aᵀ Bᵀ + bias)`` in y's dtype, each branch in its own dtype.

    Args:
        y: [..., Dout]. x: [..., Din].
        in_place: whether y, [N, Dout] then, may be written to.
        rounds_each: whether a branch is rounded to y's dtype before it is added, as by PEFT's
            layers beside bitsandbytes'; its others round the sum.
    """
    dtype = y.dtype
    for a, b, bias, scale, p in branches:
        s = x if x.dtype is a.dtype else x.to(a.dtype)
        s = functional.linear(functional.dropout(s, p) if p else s, a)
        if bias is None and s.dtype is b.dtype is y.dtype and isinstance(scale, (int, float)):
            # A product that adds to y saves two passes over it.
            y = y.addmm_(s, b.t(), alpha=scale) if in_place else add_product(y, s, b.t(), scale)
        else:
            branch = functional.linear(s, b, bias) * scale
            y = y + (branch.to(dtype) if rounds_each else branch)
    return y if y.dtype is dtype else y.to(dtype)
