"""masked_weight by the hand-written CUDA kernels: on a GPU (`cuda`), or on CPU tensors by the
simulator (`cuda_sim`).

Forward is one launch, backward two (see csrc/ops/masked_weight). Tensors that are not contiguous
are copied first. Two runs give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._contract import Call, Value
from .contract import CONTRACT

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_FACTORS = tuple(row.name for row in CONTRACT.input_rows if row.kind == "parameter")
_LETTERS = ("Dout", "Din", "R", "R2")


def supports(call: Call) -> str:
    """Why the kernels cannot serve a call; empty if they can."""
    library = _native.library_of(call.backend)
    if not hasattr(library, "masked_weight_why_not"):
        return "the compiled module was built without its CUDA kernels"
    if call.dtype not in _DTYPES:
        return (
            "it takes float32, float16 or bfloat16, and w0 is"
            f" {str(call.dtype).removeprefix('torch.')}"
        )
    return library.masked_weight_why_not(**{letter: call.sizes[letter] for letter in _LETTERS})


def forward(call: Call, **inputs: Value) -> tuple[Tensor, Tensor]:
    """y [Dout, Din], and the mask [Dout, Din] for backward."""
    shape = (call.sizes["Dout"], call.sizes["Din"])
    y = _native.empty(shape, call.dtype, call.device)
    mask = _native.empty(shape, torch.bool, call.device)
    if not y.numel():
        return y, mask
    dense = {name: _native.dense(value) for name, value in inputs.items()}
    with _native.on(call.device) as stream:
        arguments = _inputs(call, dense)
        workspace = _native.workspace(arguments.forward_workspace_bytes, call.device)
        _native.library_of(call.backend).masked_weight_fwd(
            inputs=arguments, y=y.data_ptr(), mask=mask.data_ptr(),
            workspace=_native.pointer(workspace), stream=stream,
        )  # fmt: skip
    return y, mask


def backward(
    call: Call, needs: dict[str, bool], dy: Tensor, mask: Tensor, **inputs: Value
) -> dict[str, Value]:
    """The gradients that ``needs`` names, by input name."""
    grads: dict[str, Value] = {}
    for name, need in needs.items():
        if need:
            like = inputs[name]
            grads[name] = _native.empty(like.shape, like.dtype, like.device)
    if not dy.numel():
        return {name: grad.zero_() for name, grad in grads.items()}
    dense = {name: _native.dense(value) for name, value in inputs.items()}
    with _native.on(call.device) as stream:
        arguments = _inputs(call, dense)
        workspace = _native.workspace(arguments.backward_workspace_bytes, call.device)
        _native.library_of(call.backend).masked_weight_bwd(
            inputs=arguments, dy=dy.data_ptr(), mask=mask.data_ptr(),
            dw0=_native.pointer(grads.get("w0")),
            **{f"d{name}": _typed(call, name, grads.get(name)) for name in _FACTORS},
            workspace=_native.pointer(workspace), stream=stream,
        )  # fmt: skip
    return grads


def _typed(call: Call, name: str, tensor: Tensor | None) -> tuple[int, bool]:
    """A parameter's address, and whether it is float32 beside 16-bit weights."""
    return _native.pointer(tensor), name in call.master


def _inputs(call: Call, inputs: dict[str, Value]) -> Any:
    at = call.attributes
    return _native.library_of(call.backend).MaskedWeightInputs(
        dtype=_DTYPES[call.dtype],
        **{letter: call.sizes[letter] for letter in _LETTERS},
        w0=_native.pointer(inputs["w0"]),
        **{name: _typed(call, name, inputs[name]) for name in _FACTORS},
        keep=at["keep"],
        beta=at["beta"],
        alpha1=at["alpha1"],
        alpha2=at["alpha2"],
    )
