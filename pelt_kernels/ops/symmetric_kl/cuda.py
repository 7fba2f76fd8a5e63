"""symmetric_kl by the hand-written CUDA kernels: on a GPU (`cuda`), or on CPU tensors by the
simulator (`cuda_sim`).

Forward and backward are one launch each (see csrc/ops/symmetric_kl); tensors that are not
contiguous, or do not start at a 16-byte border, are copied first. Two runs give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._contract import Call, Value

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def supports(call: Call) -> str:
    """Why the kernels cannot serve a call; empty if they can."""
    library = _native.library_of(call.backend)
    if not hasattr(library, "symmetric_kl_why_not"):
        return "the compiled module was built without its CUDA kernels"
    if call.dtype not in _DTYPES:
        return (
            "it takes float32, float16 or bfloat16, and z1 is"
            f" {str(call.dtype).removeprefix('torch.')}"
        )
    return library.symmetric_kl_why_not(T=call.sizes["T"], C=call.sizes["C"])


def forward(call: Call, z1: Tensor, z2: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss [], and both log-sum-exps [2, T] for backward (0 where a row does not count)."""
    loss = _native.empty((), torch.float32, call.device)
    lse = _native.empty((2, call.sizes["T"]), torch.float32, call.device)
    if not call.sizes["T"]:
        return loss.zero_(), lse
    dense = [_native.dense(value) for value in (z1, z2, mask)]
    with _native.on(call.device) as stream:
        arguments = _inputs(call, *dense)
        workspace = _native.workspace(arguments.forward_workspace_bytes, call.device)
        _native.library_of(call.backend).symmetric_kl_fwd(
            inputs=arguments, loss=loss.data_ptr(), lse=lse.data_ptr(),
            workspace=_native.pointer(workspace), stream=stream,
        )  # fmt: skip
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
    if not call.sizes["T"]:
        return grads
    dense = [_native.dense(value) for value in (z1, z2, mask)]
    with _native.on(call.device) as stream:
        _native.library_of(call.backend).symmetric_kl_bwd(
            inputs=_inputs(call, *dense), dloss=dloss.data_ptr(), lse=lse.data_ptr(),
            dz1=_native.pointer(grads.get("z1")), dz2=_native.pointer(grads.get("z2")),
            stream=stream,
        )  # fmt: skip
    return grads


def _inputs(call: Call, z1: Tensor, z2: Tensor, mask: Tensor | None) -> Any:
    return _native.library_of(call.backend).SymmetricKlInputs(
        dtype=_DTYPES[call.dtype], T=call.sizes["T"], C=call.sizes["C"],
        z1=z1.data_ptr(), z2=z2.data_ptr(), mask=_native.pointer(mask),
    )  # fmt: skip
