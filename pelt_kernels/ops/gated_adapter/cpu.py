"""gated_adapter by the fused C++ kernels (csrc/ops/gated_adapter/fused_cpu.cpp and its backward).

float32 and bfloat16, sums in float32; float32 parameters beside bfloat16 activations are used
unrounded. Every sum has an order fixed by the shapes: results depend neither on the run nor on the
number of threads.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._contract import Call, Value
from .._philox import threshold
from .contract import ACTIVATIONS, CONTRACT, NEVER_SKIP

FORMS = _native.cpu_forms(has_tiles=True)
_DTYPES = {torch.float32: 0, torch.bfloat16: 2}
_ACTIVATIONS = {name: i for i, name in enumerate(ACTIVATIONS)}
_POOLINGS = {"none": 0, "token": 1, "mean": 2, "masked_mean": 3}
_RESIDUALS = {"input": 0, "none": 1, "tensor": 2}
_NAMES = CONTRACT.input_names
_MAX_RANK = 1024
# Eager reads the weights as they lie: one row at D = 4096, R = 64 takes it 0.7 of the time.
_FEW_ROWS, _LARGE_WEIGHT = 2, 1 << 17
_SIXTY_FOUR_BITS = 0xFFFFFFFFFFFFFFFF


def supports(call: Call) -> str:
    """Why the kernels cannot serve a call; empty if they can."""
    if reason := _native.why_not_cpu(call.backend, "GatedAdapterCpu"):
        return reason
    if call.dtype not in _DTYPES:
        return f"it takes float32 or bfloat16, and x is {str(call.dtype).removeprefix('torch.')}"
    if call.form == _native.TILES and call.dtype != torch.bfloat16:
        return f"its tiles multiply bfloat16, and x is {str(call.dtype).removeprefix('torch.')}"
    if call.sizes["R"] > _MAX_RANK:
        return f"its tiles hold a bottleneck of at most {_MAX_RANK}, and R is {call.sizes['R']}"
    rows = call.sizes["B"] * call.sizes["S"]
    weight = call.sizes["D"] * call.sizes["R"]
    if 0 < rows <= _FEW_ROWS and weight >= _LARGE_WEIGHT:
        return f"for {rows} rows it would mostly pack weights of D x R = {weight} numbers"
    return ""


def forward(call: Call, seed: int, **inputs: Value) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, S, D], the learned gate's value (or [0]), and h [B, S, R] for backward."""
    plan, threads = _plan_of(call, inputs), torch.get_num_threads()
    y = _native.empty(plan.y_shape, call.dtype, call.device)
    gate_value = _native.empty(plan.gate_shape, torch.float32, call.device)
    h = _native.empty(plan.h_shape, call.dtype, call.device)
    if plan.is_empty:
        return y, gate_value.zero_(), h
    dense = _dense(inputs)
    workspace = _native.workspace(plan.bytes(False, threads), call.device)
    plan.native.forward(
        inputs=[0 if value is None else value.data_ptr() for value in dense], y=y.data_ptr(),
        gate_value=gate_value.data_ptr(), h=h.data_ptr(), workspace=_native.pointer(workspace),
        seed=seed & _SIXTY_FOUR_BITS, threads=threads,
    )  # fmt: skip
    return y, gate_value, h


def backward(
    call: Call,
    needs: dict[str, bool],
    dy: Tensor,
    gate_value: Tensor,
    h: Tensor,
    seed: int,
    **inputs: Value,
) -> dict[str, Value]:
    """The gradients that ``needs`` names, by input name."""
    plan, threads = _plan_of(call, inputs), torch.get_num_threads()
    grads: dict[str, Value] = {}
    for name, need in needs.items():
        if need:
            like = inputs[name]
            grads[name] = _native.empty(like.shape, like.dtype, call.device)
    if plan.is_empty:
        return {name: grad.zero_() for name, grad in grads.items()}
    dense, dy, h = _dense(inputs), dy.contiguous(), h.contiguous()
    workspace = _native.workspace(plan.bytes(True, threads), call.device)
    plan.native.backward(
        inputs=[0 if value is None else value.data_ptr() for value in dense],
        grads=[grads[name].data_ptr() if name in grads else 0 for name in _NAMES],
        dy=dy.data_ptr(), gate_value=gate_value.data_ptr(), h=h.data_ptr(),
        workspace=_native.pointer(workspace), seed=seed & _SIXTY_FOUR_BITS, threads=threads,
    )  # fmt: skip
    return grads


def _dense(inputs: dict[str, Value]) -> list[Value]:
    """The inputs in the contract's order, contiguous; the list keeps copies alive."""
    return [None if inputs[name] is None else inputs[name].contiguous() for name in _NAMES]


class _Plan:
    """What is the same for every call with these shapes: the kernels' description of it, the
    outputs' shapes, and how much memory each direction needs.
    """

    def __init__(self, call: Call, inputs: dict[str, Value]) -> None:
        at, sizes = call.attributes, call.sizes
        p = at["dropout_p"]
        self.native: Any = _native.library_of(call.backend).GatedAdapterCpu(
            isa=call.form,
            dtype=_DTYPES[call.dtype],
            masters=_bits(name in call.master for name in _NAMES),
            sizes=[*(sizes[letter] for letter in "BSDR"), sizes.get("M", 1), sizes.get("M_up", 1)],
            per_sample_or_row=[
                _ndim(inputs["down_index"]) == 1,
                _ndim(inputs["up_index"]) == 1,
                _ndim(inputs["gate"]) == 2,
            ],
            activation=_ACTIVATIONS[at["activation"]],
            pooling=_POOLINGS[at["pooling"]],
            residual_from=_RESIDUALS[at["residual_from"]],
            scale_and_eps=[at["scale_value"], at["pre_norm_eps"], at["post_norm_eps"]],
            has_skip=at["skip_below"] > NEVER_SKIP,
            skip_below=max(at["skip_below"], torch.finfo(torch.float32).min),
            threshold=threshold(p) if p else 0,
            dropout_scale=1.0 / (1.0 - p),
        )
        shapes = CONTRACT.output_shapes(call)
        self.y_shape, self.gate_shape, self.h_shape = (
            shapes["y"],
            shapes["gate_value"],
            shapes["h"],
        )
        self.is_empty = 0 in shapes["y"]
        self._given = _bits(name in call.given for name in _NAMES)
        self._bytes: dict[tuple[bool, int], int] = {}

    def bytes(self, is_backward: bool, threads: int) -> int:
        """The size of the workspace."""
        size = self._bytes.get((is_backward, threads))
        if size is None:
            size = self._bytes[is_backward, threads] = self.native.workspace_bytes(
                is_backward=is_backward, given=self._given, threads=threads
            )
        return size


_plans: dict[int, tuple[Call, _Plan]] = {}


def _plan_of(call: Call, inputs: dict[str, Value]) -> _Plan:
    found = _plans.get(id(call))
    if found is None or found[0] is not call:
        if len(_plans) >= 4096:  # as many as the contract keeps calls
            _plans.clear()
        found = _plans[id(call)] = (call, _Plan(call, inputs))
    return found[1]


def _bits(flags: Iterable[bool]) -> int:
    return sum(1 << i for i, flag in enumerate(flags) if flag)


def _ndim(tensor: Tensor | None) -> int:
    return -1 if tensor is None else tensor.ndim
