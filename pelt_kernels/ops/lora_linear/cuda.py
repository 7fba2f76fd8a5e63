"""lora_linear by hand-written CUDA kernels: on a GPU (`cuda`), or on CPU tensors by the simulator
(`cuda_sim`), where torch's CPU product takes cuBLAS's place. It has two forms.

*composed*: cuBLAS multiplies by the frozen weight, and kernels add the branches. Forward is two
launches beside the base product, backward three, and two more with gates.

*single*: a kernel of our own multiplies by the frozen weight, and the branches ride on it. Forward
is one launch; backward is one for dx and one for the factors' gradients, one more where a gate is a
tensor with a gradient, and three more with learned gates, which may be of single tokens only. A
float32 weight beside 16-bit activations is rounded by torch first, a launch more.

In both, gradients of a weight or bias that is not frozen are torch's (see csrc/ops/lora_linear for
the rest). Tensors that are not contiguous, or do not start at a 16-byte border, are copied first.
Gradients are summed in a fixed order: two runs give the same bits. Where B is zero, y is the form's
base product bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._contract import Call, Value
from ._native_plan import (
    SIXTY_FOUR_BITS,
    base_grads,
    base_product,
    count_gates,
    number_of,
    plan_of,
    pooling_numbers,
)

FORMS = ("composed", "single")
NO_BASE = (0, 0, False, False)  # of the composed form, whose base product is torch's


def supports(call: Call) -> str:
    """Why the kernels cannot serve a call; empty if they can. Decided by the C++ side."""
    library = _native.library_of(call.backend)
    if not hasattr(library, "lora_linear_why_not"):
        return "the compiled module was built without its CUDA kernels"
    if call.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its matrix products take float16 or bfloat16 activations, and x is {call.dtype}"
    at, sizes = call.attributes, [call.sizes[letter] for letter in ("B", "S", "Din", "Dout")]
    refusal: str = library.lora_linear_why_not(
        dtype=number_of(call.dtype), sizes=sizes, branches=len(at["offsets"]),
        gates=count_gates(call),
    )  # fmt: skip
    if refusal or call.form != "single":
        return refusal
    gates = pooling_numbers(call)
    learned = iter(range(len(gates)))
    numbers = [-1 if pooling == "none" else next(learned) for pooling in at["poolings"]]
    ranks, widths = call.sizes.get("R_i", ()), call.sizes.get("size_i", ())
    branches = [list(of) for of in zip(ranks, widths, at["offsets"], numbers)]
    return library.lora_linear_why_not_single(sizes=sizes, branches=branches, gates=gates)


def _base(call: Call, weight: Tensor, bias: Tensor | None, borrowed: list[Tensor]) -> Any:
    """What the single launch multiplies by itself: weight, bias, and how they lie."""
    weight = _native.dense(weight.to(call.dtype))
    bias = _native.dense(bias)
    borrowed += [weight] if bias is None else [weight, bias]
    is_float32 = bias is not None and bias.dtype == torch.float32
    return weight.data_ptr(), _native.pointer(bias), is_float32, call.attributes["transposed"]


def forward(
    call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, seed: int, **inputs: Value
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """y [B, S, Dout], the extra gates, the branches' learned gates (or [0] each), and s [B, S, ΣR]
    for backward.
    """
    plan = plan_of(call, inputs, _native.library_of(call.backend).LoraLinearCuda)
    is_single = call.form == "single" and not plan.is_empty
    with _native.on(call.device) as stream:
        if is_single:
            y = _native.empty((*x.shape[:2], call.sizes["Dout"]), x.dtype, call.device)
        else:
            y = base_product(call, x, weight, bias)
        extras, values, s = plan.outputs(call)
        if plan.is_empty or not (plan.has_work or is_single):
            return y, extras, values, s
        x = _native.dense(x)
        borrowed: list[Tensor] = []
        size = 0 if is_single else plan.native.forward_workspace_bytes
        workspace = _native.workspace(size, call.device)
        none = [None] * len(extras)
        plan.native.forward(
            **plan.addresses(inputs, values, extras, none, _native.dense, borrowed),
            base=_base(call, weight, bias, borrowed) if is_single else NO_BASE,
            x=x.data_ptr(), s=s.data_ptr(), y=y.data_ptr(), workspace=_native.pointer(workspace),
            seed=seed & SIXTY_FOUR_BITS, stream=stream,
        )  # fmt: skip
    return y, extras, values, s


def backward(
    call: Call,
    needs: dict[str, bool],
    dy: Tensor,
    dextra_gates: list[Tensor],
    gate_values: list[Tensor],
    s: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: int,
    **inputs: Value,
) -> dict[str, Value]:
    """The gradients that ``needs`` names, by input name."""
    plan = plan_of(call, inputs, _native.library_of(call.backend).LoraLinearCuda)
    is_single = call.form == "single" and needs["x"] and not plan.is_empty
    with _native.on(call.device) as stream:
        by_torch = {**needs, "x": False} if is_single else needs
        grads = base_grads(call, by_torch, dy, x, weight, bias, dy.dtype)
        if is_single:
            grads["x"] = _native.empty(x.shape, x.dtype, call.device)
        grads |= plan.empty_grads(needs, inputs)
        if plan.is_empty or not (plan.has_work or is_single):
            return grads
        dy, s, x = _native.dense(dy), _native.dense(s), _native.dense(x)
        borrowed: list[Tensor] = []
        wanted, none = plan.gradients(grads), [None] * len(dextra_gates)
        workspace = _native.workspace(plan.native.backward_workspace_bytes(**wanted), call.device)
        plan.native.backward(
            **plan.addresses(inputs, gate_values, none, dextra_gates, _native.dense, borrowed),
            **wanted,
            base=_base(call, weight, None, borrowed) if is_single else NO_BASE,
            x=x.data_ptr(), s=s.data_ptr(), dy=dy.data_ptr(), dx=_native.pointer(grads.get("x")),
            workspace=_native.pointer(workspace), seed=seed & SIXTY_FOUR_BITS, stream=stream,
        )  # fmt: skip
    return grads
