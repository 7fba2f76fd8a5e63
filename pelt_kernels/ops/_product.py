"""Products of the references, the same on every processor.

torch's own product of 16-bit tensors is that of the processor's matrix unit, and they differ: where
the depth is no multiple of 4, oneDNN on AMX lets what is not finite in one row into the row before
it. Other results are held to the references, so they multiply in float32, where a product of two
16-bit numbers is exact, and round the sum once, as a matrix unit that is right does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._gate import accumulator


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b, with sums in the accumulator dtype, rounded once to the dtype of a."""
    acc = accumulator(a.dtype)
    return (a.to(acc) @ b.to(acc)).to(a.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b likewise, for a weight [O, I] or one for each sample [B, O, I], and parameters first
    rounded to the dtype of x.
    """
    acc = accumulator(x.dtype)
    weight = weight.to(x.dtype).to(acc)
    bias = None if bias is None else bias.to(x.dtype).to(acc)
    if weight.ndim == 2:
        return torch.nn.functional.linear(x.to(acc), weight, bias).to(x.dtype)
    out = x.to(acc) @ weight.transpose(1, 2)
    if bias is not None:
        out = out + (bias[:, None] if bias.ndim == 2 else bias)
    return out.to(x.dtype)
