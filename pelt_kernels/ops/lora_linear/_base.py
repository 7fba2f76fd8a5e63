"""What backends whose kernels add the branches leave to PyTorch: the frozen layer's gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from .._bank import weight_grad
from .._contract import Chosen, Value


def base_grads(
    chosen: Chosen, needs: dict[str, bool], dy: Tensor, inputs: dict[str, Value], dtype: torch.dtype
) -> dict[str, Value]:
    """The gradients of the base product, multiplied in a dtype: dx for the kernels to add to, and
    the weight's and the bias's where they are not frozen.
    """
    x, weight, bias = inputs["x"], inputs["weight"], inputs["bias"]
    is_transposed, wide = chosen.attributes["transposed"], dy.to(dtype)
    grads: dict[str, Value] = {}
    if needs["x"]:
        base = (weight.T if is_transposed else weight).to(dtype)
        grads["x"] = (wide @ base).to(dy.dtype).contiguous()
    if needs["weight"]:
        rows, columns = (x.to(dtype), wide) if is_transposed else (wide, x.to(dtype))
        grads["weight"] = weight_grad(rows, columns, False).to(weight.dtype).contiguous()
    if bias is not None and needs["bias"]:
        grads["bias"] = dy.sum(dim=(0, 1), dtype=torch.float32).to(bias.dtype)
    return grads
