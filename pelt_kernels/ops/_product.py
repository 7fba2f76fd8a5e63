"""Products of the references, the same on every processor.

torch's own product of 16-bit tensors is that of the processor's matrix unit, and they differ: where
the depth is no multiple of 4, oneDNN on AMX lets what is not finite in one row into the row before
it. Other results are held to the references, so they multiply in float32, where a product of two
16-bit numbers is exact, and round the sum once, as a matrix unit that is right does.

What is not finite has one rule, which the references follow and every backend with them. *What is
hidden is not read*: whatever stands there, no output and no gradient changes, and as long as what
is read is finite, its own gradient is 0. Hidden are

- keys and values that a key mask or a length hides from every query;
- members of banks and tables that no index names;
- for a gate pooled over the tokens that count, and for the gradients of its weight and bias, the
  other tokens (their own rows of an output are made of them all the same);
- for a branch of `lora_linear`, the output's columns beside its own;
- rows that `skip_below` skips, and rows that do not count in `symmetric_kl`;
- for `masked_weight` the factors of a term whose beta, alpha1 or alpha2 is 0.

*What is read follows IEEE by the formula*: 0 times a NaN is one, relu lets nothing through where it
has no slope, and a class whose logit is -inf has the probability 0 and the term 0 log 0 = 0. Scores
that are NaN are ordered as infinity. Two places have no rule, since tiles decide what is multiplied
there: a NaN in a key that causality hides from some queries may reach those too, and dropout may
drop a NaN or leave it.
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
