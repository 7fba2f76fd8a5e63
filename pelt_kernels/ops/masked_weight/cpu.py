"""masked_weight by the fused C++ kernels (csrc/ops/masked_weight/fused_cpu.cpp).

The threshold is selected, not sorted for, and nothing the size of the matrix is kept beside the
result and the mask. Results depend neither on the run nor on the number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._contract import Call, Value

FORMS = _native.cpu_forms()
_DTYPES = (torch.float32, torch.bfloat16)
_FACTORS = ("u", "v", "a", "b", "row", "col")


def supports(call: Call) -> str:
    """Why the kernels cannot serve a call; empty if they can."""
    if reason := _native.why_not_cpu(call.backend, "masked_weight_cpu_fwd"):
        return reason
    if call.dtype not in _DTYPES:
        return f"it takes float32 or bfloat16, and w0 is {str(call.dtype).removeprefix('torch.')}"
    return _native.library_of(call.backend).masked_weight_cpu_why_not(
        Dout=call.sizes["Dout"], Din=call.sizes["Din"]
    )


def forward(
    call: Call,
    w0: Tensor,
    u: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    row: Tensor,
    col: Tensor,
) -> tuple[Tensor, Tensor]:
    """y [Dout, Din], and the mask [Dout, Din] for backward."""
    y = _native.empty(w0.shape, call.dtype, call.device)
    mask = _native.empty(w0.shape, torch.bool, call.device)
    if not y.numel():
        return y, mask
    inputs, borrowed = _inputs(call, w0, u, v, a, b, row, col)
    workspace = _native.workspace(inputs.forward_bytes, call.device)
    _native.library_of(call.backend).masked_weight_cpu_fwd(
        inputs=inputs, y=y.data_ptr(), mask=mask.data_ptr(), workspace=_native.pointer(workspace)
    )
    del borrowed
    return y, mask


def backward(
    call: Call,
    needs: dict[str, bool],
    dy: Tensor,
    mask: Tensor,
    w0: Tensor,
    u: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    row: Tensor,
    col: Tensor,
) -> dict[str, Value]:
    """The gradients that ``needs`` names, by input name."""
    given = dict(zip(_FACTORS, (u, v, a, b, row, col)))
    if not dy.numel():
        everything = {"w0": w0, **given}
        return {name: torch.zeros_like(everything[name]) for name, need in needs.items() if need}
    found = {
        name: _native.empty(factor.shape, torch.float32, call.device)
        for name, factor in given.items()
    }
    dw0 = _native.empty(w0.shape, call.dtype, call.device) if needs["w0"] else None
    inputs, borrowed = _inputs(call, w0, u, v, a, b, row, col)
    workspace = _native.workspace(inputs.backward_bytes, call.device)
    _native.library_of(call.backend).masked_weight_cpu_bwd(
        inputs=inputs, dy=dy.data_ptr(), mask=mask.data_ptr(), dw0=_native.pointer(dw0),
        **{f"d{name}": grad.data_ptr() for name, grad in found.items()},
        workspace=_native.pointer(workspace),
    )  # fmt: skip
    del borrowed
    grads: dict[str, Value] = {
        name: found[name].to(factor.dtype) for name, factor in given.items() if needs[name]
    }
    if dw0 is not None:
        grads["w0"] = dw0
    return grads


def _inputs(call: Call, w0: Tensor, *factors: Tensor) -> tuple[Any, list[Tensor]]:
    """The C++ side's view of a call, and tensors that have to live as long as it."""
    at, sizes = call.attributes, call.sizes
    if w0.stride(1) != 1:
        w0 = w0.contiguous()
    # Factors are small beside the matrix, and scores are float32 in any case.
    dense = [factor.float().contiguous() for factor in factors]
    inputs = _native.library_of(call.backend).MaskedWeightCpuInputs(
        isa=call.form, is_float32=call.dtype == torch.float32,
        sizes=[sizes[letter] for letter in ("Dout", "Din", "R", "R2")],
        w0=w0.data_ptr(), w0_stride=w0.stride(0),
        **{name: factor.data_ptr() for name, factor in zip(_FACTORS, dense)},
        keep=at["keep"], beta=at["beta"], alpha1=at["alpha1"], alpha2=at["alpha2"],
        threads=torch.get_num_threads(),
    )  # fmt: skip
    return inputs, [w0, *dense]
