"""gated_adapter by the hand-written CUDA kernels: on a GPU (`cuda`), or on CPU tensors by the
simulator (`cuda_sim`).

Forward is one launch, backward two (see csrc/ops/gated_adapter). Tensors that are not contiguous,
or do not start at a 16-byte border, are copied first. Gradients are summed in a fixed order: two
runs give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._contract import Call, Value
from .contract import ACTIVATIONS, CONTRACT, NEVER_SKIP

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ACTIVATIONS = {name: i for i, name in enumerate(ACTIVATIONS)}
_POOLINGS = {"none": 0, "token": 1, "mean": 2, "masked_mean": 3}
_RESIDUALS = {"input": 0, "none": 1, "tensor": 2}
_PARAMETERS = tuple(row.name for row in CONTRACT.input_rows if row.kind == "parameter")


def supports(call: Call) -> str:
    """Why the kernels cannot serve a call; empty if they can. Decided by the C++ side, which knows
    its configurations.
    """
    library = _native.library_of(call.backend)
    if not hasattr(library, "gated_adapter_why_not"):
        return "the compiled module was built without its CUDA kernels"
    if call.dtype not in _DTYPES:
        return f"its matrix products take float16 or bfloat16 activations, and x is {call.dtype}"
    sizes = {letter: call.sizes[letter] for letter in "BSDR"}
    return library.gated_adapter_why_not(dtype=_DTYPES[call.dtype], **sizes)


def forward(call: Call, seed: int, **inputs: Value) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, S, D], the learned gate's value (or [0]), and h [B, S, R] for backward."""
    shapes = CONTRACT.output_shapes(call)
    y = _native.empty(shapes["y"], call.dtype, call.device)
    gate_value = _native.empty(shapes["gate_value"], torch.float32, call.device)
    h = _native.empty(shapes["h"], call.dtype, call.device)
    if y.numel() == 0:
        return y, gate_value.zero_(), h
    dense = {name: _native.dense(value) for name, value in inputs.items()}
    with _native.on(call.device) as stream:
        arguments = _inputs(call, dense, seed)
        workspace = _native.workspace(arguments.forward_workspace_bytes, call.device)
        _native.library_of(call.backend).gated_adapter_fwd(
            inputs=arguments, y=y.data_ptr(), gate_value=gate_value.data_ptr(), h=h.data_ptr(),
            workspace=_native.pointer(workspace), stream=stream,
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
    grads: dict[str, Value] = {}
    for name, need in needs.items():
        if need:
            like = inputs[name]
            grads[name] = _native.empty(like.shape, like.dtype, like.device)
    if dy.numel() == 0:
        return {name: grad.zero_() for name, grad in grads.items()}
    dense = {name: _native.dense(value) for name, value in inputs.items()}
    dy, h = _native.dense(dy), _native.dense(h)
    with _native.on(call.device) as stream:
        arguments = _inputs(call, dense, seed)
        workspace = _native.workspace(arguments.backward_workspace_bytes, call.device)
        _native.library_of(call.backend).gated_adapter_bwd(
            inputs=arguments, dy=dy.data_ptr(), gate_value=gate_value.data_ptr(), h=h.data_ptr(),
            dx=_native.pointer(grads.get("x")),
            **{f"d{name}": _typed(call, name, grads.get(name)) for name in _PARAMETERS},
            workspace=_native.pointer(workspace), stream=stream,
        )  # fmt: skip
    return grads


def _typed(call: Call, name: str, tensor: Tensor | None) -> tuple[int, bool]:
    """A parameter's address, and whether it is float32 beside 16-bit activations."""
    return _native.pointer(tensor), name in call.master


def _inputs(call: Call, inputs: dict[str, Value], seed: int) -> Any:
    at, sizes = call.attributes, call.sizes
    down_index, up_index, gate = inputs["down_index"], inputs["up_index"], inputs["gate"]
    return _native.library_of(call.backend).GatedAdapterInputs(
        dtype=_DTYPES[call.dtype],
        **{letter: sizes[letter] for letter in "BSDR"},
        **{name: _typed(call, name, inputs[name]) for name in _PARAMETERS},
        **{
            name: _native.pointer(inputs[name])
            for name in ("x", "down_index", "up_index", "mask", "residual")
        },
        down_members=sizes.get("M", 1),
        up_members=sizes.get("M_up", 1),
        has_down_index_per_sample=down_index is not None and down_index.ndim == 1,
        has_up_index_per_sample=up_index is not None and up_index.ndim == 1,
        has_gate_per_row=gate is not None and gate.ndim == 2,
        activation=_ACTIVATIONS[at["activation"]],
        pooling=_POOLINGS[at["pooling"]],
        residual_from=_RESIDUALS[at["residual_from"]],
        scale_value=at["scale_value"],
        pre_norm_eps=at["pre_norm_eps"],
        post_norm_eps=at["post_norm_eps"],
        dropout_p=at["dropout_p"],
        seed=seed & 0xFFFFFFFFFFFFFFFF,
        has_skip=at["skip_below"] > NEVER_SKIP,
        skip_below=max(at["skip_below"], torch.finfo(torch.float32).min),
    )
