"""symmetric_kl by the fused C++ kernels (csrc/ops/symmetric_kl/fused_cpu.cpp).

Forward reads the logits once, backward a second time; rows that do not count are not read. Results
depend neither on the run nor on the number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._contract import Call, Value

FORMS = _native.cpu_forms()
_DTYPES = (torch.float32, torch.bfloat16)


def supports(call: Call) -> str:
    """Why the kernels cannot serve a call; empty if they can."""
    if reason := _native.why_not_cpu(call.backend, "symmetric_kl_cpu_fwd"):
        return reason
    if call.dtype not in _DTYPES:
        return f"it takes float32 or bfloat16, and z1 is {str(call.dtype).removeprefix('torch.')}"
    return ""


def forward(call: Call, z1: Tensor, z2: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss [], and both log-sum-exps [2, T] for backward (0 where a row does not count)."""
    loss = _native.empty((), torch.float32, call.device)
    lse = _native.empty((2, call.sizes["T"]), torch.float32, call.device)
    rows = _native.empty((call.sizes["T"],), torch.float32, call.device)
    inputs, borrowed = _inputs(call, z1, z2, mask)
    _native.library_of(call.backend).symmetric_kl_cpu_fwd(
        inputs=inputs, rows=rows.data_ptr(), lse=lse.data_ptr(), loss=loss.data_ptr()
    )
    del borrowed
    return loss, lse


def backward(
    call: Call,
    needs: dict[str, bool],
    dloss: Tensor,
    lse: Tensor,
    z1: Tensor,
    z2: Tensor,
    mask: Tensor | None,
) -> dict[str, Value]:
    """The gradients that ``needs`` names: ±0.5 (p1 - p2) / count."""
    grads: dict[str, Value] = {
        name: _native.empty(z1.shape, call.dtype, call.device)
        for name in ("z1", "z2")
        if needs[name]
    }
    inputs, borrowed = _inputs(call, z1, z2, mask)
    _native.library_of(call.backend).symmetric_kl_cpu_bwd(
        inputs=inputs, dloss=dloss.data_ptr(), lse=lse.data_ptr(),
        dz1=_native.pointer(grads.get("z1")), dz2=_native.pointer(grads.get("z2")),
    )  # fmt: skip
    del borrowed
    return grads


def _inputs(call: Call, z1: Tensor, z2: Tensor, mask: Tensor | None) -> tuple[Any, list[Any]]:
    """The C++ side's view of a call, and tensors that have to live as long as it."""
    z1, z2 = (z if z.stride(1) == 1 else z.contiguous() for z in (z1, z2))
    mask = None if mask is None else mask.contiguous()
    inputs = _native.library_of(call.backend).SymmetricKlCpuInputs(
        isa=call.form, is_float32=call.dtype == torch.float32, T=call.sizes["T"], C=call.sizes["C"],
        z1=z1.data_ptr(), z2=z2.data_ptr(), z1_stride=z1.stride(0), z2_stride=z2.stride(0),
        mask=_native.pointer(mask), threads=torch.get_num_threads(),
    )  # fmt: skip
    return inputs, [z1, z2, mask]
