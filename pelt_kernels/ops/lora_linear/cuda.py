"""lora_linear by cuBLAS for the frozen weight and hand-written CUDA kernels around it: on a GPU
(`cuda`), or on CPU tensors by the simulator (`cuda_sim`), where torch's CPU product takes cuBLAS's
place.

Forward is two launches beside the base product, backward three, and two more with gates (see
csrc/ops/lora_linear). Tensors that are not contiguous, or do not start at a 16-byte border, are
copied first. Gradients are summed in a fixed order: two runs give the same bits. Where B is zero, y
is the base product bit for bit.
"""

from __future__ import annotations

from types import ModuleType

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
)


def _library(call: Call) -> ModuleType:
    return _native.library("_C_sim" if call.backend == "cuda_sim" else "_C")


def supports(call: Call) -> str:
    """Why the kernels cannot serve a call; empty if they can. Decided by the C++ side."""
    library = _library(call)
    if not hasattr(library, "lora_linear_why_not"):
        return "the compiled module was built without its CUDA kernels"
    if call.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its matrix products take float16 or bfloat16 activations, and x is {call.dtype}"
    return library.lora_linear_why_not(
        dtype=number_of(call.dtype),
        sizes=[call.sizes[letter] for letter in ("B", "S", "Din", "Dout")],
        branches=len(call.attributes["offsets"]),
        gates=count_gates(call),
    )


def forward(
    call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, seed: int, **inputs: Value
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """y [B, S, Dout], the extra gates, the branches' learned gates (or [0] each), and s [B, S, ΣR]
    for backward.
    """
    plan = plan_of(call, inputs, _library(call).LoraLinearCuda)
    with _native.on(call.device) as stream:
        y = base_product(call, x, weight, bias)
        extras, values, s = plan.outputs(call)
        if plan.is_empty or not plan.has_work:
            return y, extras, values, s
        x = _native.dense(x)
        borrowed: list[Tensor] = []
        workspace = _native.workspace(plan.native.forward_workspace_bytes, call.device)
        none = [None] * len(extras)
        plan.native.forward(
            **plan.addresses(inputs, values, extras, none, _native.dense, borrowed),
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
    plan = plan_of(call, inputs, _library(call).LoraLinearCuda)
    with _native.on(call.device) as stream:
        grads = base_grads(call, needs, dy, x, weight, bias, dy.dtype)
        grads |= plan.empty_grads(needs, inputs)
        if plan.is_empty or not plan.has_work:
            return grads
        dy, s, x = _native.dense(dy), _native.dense(s), _native.dense(x)
        borrowed: list[Tensor] = []
        wanted, none = plan.gradients(grads), [None] * len(dextra_gates)
        workspace = _native.workspace(plan.native.backward_workspace_bytes(**wanted), call.device)
        plan.native.backward(
            **plan.addresses(inputs, gate_values, none, dextra_gates, _native.dense, borrowed),
            **wanted,
            x=x.data_ptr(), s=s.data_ptr(), dy=dy.data_ptr(), dx=_native.pointer(grads.get("x")),
            workspace=_native.pointer(workspace), seed=seed & SIXTY_FOUR_BITS, stream=stream,
        )  # fmt: skip
    return grads
