"""lora_linear by compiled kernels: `cuda` and `cpu`, and both simulated (csrc/ops/lora_linear,
docs/kernels/lora_linear.md).

CUDA has two forms. *composed*: cuBLAS multiplies by the frozen weight, and kernels add the
branches. Forward is two launches beside the base product, backward three, and two more with gates.
*single*: a kernel of our own multiplies by the weight and adds the branches on the way. Forward is
one launch; backward is one for dx and one for the factors' gradients, one more where a gate is a
tensor with a gradient, and three more with learned gates, which may be of single tokens only. A
float32 weight beside 16-bit activations is rounded by torch first, a launch more.

CPU: torch's own product for the weight and fused kernels around it, a form for each instruction
set. float32 parameters of the branches beside bfloat16 activations are used unrounded, but by the
form `amx`, whose tiles take A and B rounded and a gate's weight as two numbers.

In all of them gradients of a weight or bias that is not frozen are torch's. Every sum of the
kernels has an order fixed by the shapes: two runs give the same bits, on any number of threads.
Where B is zero, y is the form's base product bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._bank import linear, weight_grad
from .._contract import Chosen, Value
from .._native_call import kernels_of, plan, supports
from .contract import CONTRACT

__all__ = ["FORMS", "backward", "forward", "plan", "supports"]

FORMS = {"cuda": ("composed", "single"), "cpu": _native.cpu_forms(has_tiles=True)}
# The inputs whose gradients the kernels write, beside dx.
_OWN = tuple(row.name for row in CONTRACT.input_rows if row.is_list and row.kind == "parameter")


def forward(
    chosen: Chosen, x: Tensor, weight: Tensor, bias: Tensor | None, **inputs: Value
) -> Sequence[Any]:
    """y [B, S, Dout], the extra gates, the branches' learned gates (or [0] each), and s [B, S, ΣR]
    for backward.
    """
    if _is_single(chosen):
        outputs, base = chosen.plan.outputs(), {"weight": weight.to(x.dtype), "bias": bias}
    else:
        y = linear(x, weight.T if chosen.attributes["transposed"] else weight, bias)
        outputs, base = chosen.plan.outputs(y.contiguous()), _NO_BASE
    if not chosen.plan.is_empty:
        chosen.plan.run_forward({**inputs, **base, "x": x}, outputs)
    return outputs


def backward(
    chosen: Chosen,
    needs: dict[str, bool],
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    **values: Value,
) -> dict[str, Value]:
    """The gradients that ``needs`` names, by input name."""
    is_single = _is_single(chosen) and needs["x"]
    grads = _base_grads(chosen, {**needs, "x": needs["x"] and not is_single}, dy, x, weight, bias)
    grads |= chosen.plan.gradients({name: needs[name] for name in _OWN}, values)
    base = _NO_BASE
    if is_single:
        grads["x"] = _native.empty(x.shape, x.dtype, chosen.device)
        base = {"weight": weight.to(x.dtype), "bias": None}
    if not chosen.plan.is_empty:
        chosen.plan.run_backward({**values, **base, "dy": dy, "x": x}, grads)
    return grads


# Of kernels that add to a base product of torch's: they read neither.
_NO_BASE: dict[str, Value] = {"weight": None, "bias": None}


def _is_single(chosen: Chosen) -> bool:
    """Do the kernels multiply by the base weight? Without rows there is nothing to launch."""
    return chosen.form == "single" and not chosen.plan.is_empty


def _base_grads(
    chosen: Chosen,
    needs: dict[str, bool],
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> dict[str, Value]:
    """The gradients of the base product: dx for the kernels to add to, and the weight's and the
    bias's where they are not frozen.
    """
    grads: dict[str, Value] = {}
    is_transposed = chosen.attributes["transposed"]
    dtype = dy.dtype if kernels_of(chosen.backend) == "cuda" else _product_dtype(dy.dtype)
    wide = dy.to(dtype)
    if needs["x"]:
        base = (weight.T if is_transposed else weight).to(dtype)
        grads["x"] = (wide @ base).to(dy.dtype).contiguous()
    if needs["weight"]:
        rows, columns = (x.to(dtype), wide) if is_transposed else (wide, x.to(dtype))
        grads["weight"] = weight_grad(rows, columns, False).to(weight.dtype).contiguous()
    if bias is not None and needs["bias"]:
        grads["bias"] = dy.sum(dim=(0, 1), dtype=torch.float32).to(bias.dtype)
    return grads


@cache
def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what a CPU computes the gradients of the base product: float32 for bfloat16 where the
    processor does not multiply bfloat16, for there torch takes 70 times as long for dy W (EPYC Zen
    3, T = 128, D = 768). Forward keeps torch's product, so that a B of zero changes no bit.
    """
    if dtype != torch.bfloat16:
        return dtype
    has_product = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return dtype if has_product is not None and has_product() else torch.float32
