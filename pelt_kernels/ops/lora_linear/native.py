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
from .._bank import linear
from .._contract import Chosen, Value
from .._native_call import kernels_of, plan, supports
from ._base import base_grads
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
        added_to = []
    else:
        y = linear(x, weight.T if chosen.attributes["transposed"] else weight, bias).contiguous()
        outputs, base = chosen.plan.outputs(y), _NO_BASE
        added_to = [y]
    if not chosen.plan.is_empty:
        chosen.plan.run_forward({**inputs, **base, "x": x}, outputs, added_to)
    return outputs


def backward(
    chosen: Chosen, needs: dict[str, bool], dy: Tensor, **values: Value
) -> dict[str, Value]:
    """The gradients that ``needs`` names, by input name."""
    x, is_single = values["x"], _is_single(chosen) and needs["x"]
    dtype = dy.dtype if kernels_of(chosen.backend) == "cuda" else _product_dtype(dy.dtype)
    by_torch = {**needs, "x": needs["x"] and not is_single}
    grads = base_grads(chosen, by_torch, dy, values, dtype)
    grads |= chosen.plan.gradients({name: needs[name] for name in _OWN}, values)
    base, added_to = _NO_BASE, [grads["x"]] if "x" in grads else []
    if is_single:
        grads["x"] = _native.empty(x.shape, x.dtype, chosen.device)
        base = {"weight": values["weight"].to(x.dtype), "bias": None}
    if not chosen.plan.is_empty:
        chosen.plan.run_backward({**values, **base, "dy": dy}, grads, added_to)
    return grads


# Of kernels that add to a base product of torch's: they read neither.
_NO_BASE: dict[str, Value] = {"weight": None, "bias": None}


def _is_single(chosen: Chosen) -> bool:
    """Do the kernels multiply by the base weight? Without rows there is nothing to launch."""
    return chosen.form == "single" and not chosen.plan.is_empty


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
