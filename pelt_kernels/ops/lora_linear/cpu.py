"""lora_linear by torch's own product for the frozen weight and fused C++ kernels around it
(csrc/ops/lora_linear/fused_cpu.cpp and its backward).

float32 and bfloat16, sums in float32; float32 parameters of the branches beside bfloat16
activations are used unrounded, but by the form `amx`, whose tiles take A and B rounded and a gate's
weight as two numbers. Every sum of the kernels has an order fixed by the shapes: results depend
neither on the run nor on the number of threads beyond what torch's product does. Where B is zero, y
is that product bit for bit.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._contract import Call, Value
from ._native_plan import SIXTY_FOUR_BITS, Plan, base_grads, base_product, count_gates, plan_of

FORMS = _native.cpu_forms(has_tiles=True)
# Eager reads the factors as they lie: one row at Din = 4096, R = 64 takes it 0.9 of the time.
_FEW_ROWS, _LARGE_FACTOR = 2, 1 << 17
# Beyond these, factors are products like any other, and torch's own are faster: forward + backward
# of 256 ranks took 1.25 of eager's time (T = 1024, D = 768 and 1024; 192 ranks 0.93, EPYC Zen 3).
# In bfloat16 eager is far slower than that.
_MAX_RANKS = 192


def supports(call: Call) -> str:
    """Why the kernels cannot serve a call; empty if they can."""
    if reason := _native.why_not_cpu(call.backend, "LoraLinearCpu"):
        return reason
    if call.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 or bfloat16, and x is {str(call.dtype).removeprefix('torch.')}"
    if call.form == _native.TILES and call.dtype != torch.bfloat16:
        return f"its tiles multiply bfloat16, and x is {str(call.dtype).removeprefix('torch.')}"
    branches, gates = len(call.attributes["offsets"]), count_gates(call)
    native = _native.library_of(call.backend).LoraLinearCpu
    if branches > native.max_branches or gates > native.max_gates:
        return (
            f"it takes at most {native.max_branches} branches and {native.max_gates} learned gates,"
            f" and there are {branches} and {gates}"
        )
    rows, ranks = call.sizes["B"] * call.sizes["S"], sum(call.sizes.get("R_i", ()))
    if call.dtype == torch.float32 and ranks > _MAX_RANKS:
        return (
            f"in float32 torch's own products are faster beyond {_MAX_RANKS} ranks in all, and"
            f" there are {ranks}"
        )
    factor = ranks * call.sizes["Din"]
    if 0 < rows <= _FEW_ROWS and factor >= _LARGE_FACTOR:
        return f"for {rows} rows it would mostly copy factors of ΣR x Din = {factor} numbers"
    return ""


def forward(
    call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, seed: int, **inputs: Value
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """y [B, S, Dout], the extra gates, the branches' learned gates (or [0] each), and s [B, S, ΣR]
    for backward.
    """
    plan = plan_of(call, inputs, _native.library_of(call.backend).LoraLinearCpu, isa=call.form)
    y = base_product(call, x, weight, bias)
    extras, values, s = plan.outputs(call)
    if plan.is_empty or not plan.has_work:
        return y, extras, values, s
    x = x.contiguous()
    borrowed: list[Tensor] = []
    threads = torch.get_num_threads()
    workspace = _workspace(plan, call, False, threads)
    plan.native.forward(
        **plan.addresses(inputs, values, extras, [None] * len(extras), _dense, borrowed),
        x=x.data_ptr(), s=s.data_ptr(), y=y.data_ptr(), workspace=_native.pointer(workspace),
        seed=seed & SIXTY_FOUR_BITS, threads=threads,
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
    plan = plan_of(call, inputs, _native.library_of(call.backend).LoraLinearCpu, isa=call.form)
    grads = base_grads(call, needs, dy, x, weight, bias, _product_dtype(call.dtype))
    grads |= plan.empty_grads(needs, inputs)
    if plan.is_empty or not plan.has_work:
        return grads
    dy, s, x = dy.contiguous(), s.contiguous(), x.contiguous()
    borrowed: list[Tensor] = []
    none, threads = [None] * len(dextra_gates), torch.get_num_threads()
    workspace = _workspace(plan, call, True, threads)
    plan.native.backward(
        **plan.addresses(inputs, gate_values, none, dextra_gates, _dense, borrowed),
        **plan.gradients(grads),
        x=x.data_ptr(), s=s.data_ptr(), dy=dy.data_ptr(), dx=_native.pointer(grads.get("x")),
        workspace=_native.pointer(workspace), seed=seed & SIXTY_FOUR_BITS, threads=threads,
    )  # fmt: skip
    return grads


@cache
def _product_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what the gradients of the base product are computed: float32 for bfloat16 where the
    processor does not multiply bfloat16, for there torch takes 70 times as long for dy W (EPYC Zen
    3, T = 128, D = 768). Forward keeps torch's product, so that a B of zero changes no bit.
    """
    if dtype != torch.bfloat16:
        return dtype
    has_product = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return dtype if has_product is not None and has_product() else torch.float32


def _dense(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


def _workspace(plan: Plan, call: Call, is_backward: bool, threads: int) -> Tensor | None:
    key: Any = (is_backward, threads)
    size = plan.bytes.get(key)
    if size is None:
        size = plan.bytes[key] = plan.native.workspace_bytes(
            is_backward=is_backward, threads=threads
        )
    return _native.workspace(size, call.device)
