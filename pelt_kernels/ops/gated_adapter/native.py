"""gated_adapter by compiled kernels: `cuda` and `cpu`, and both simulated (csrc/ops/gated_adapter).

CUDA: forward is one launch, backward two, on 16-bit activations. CPU: float32 and bfloat16;
float32 parameters beside bfloat16 activations are used unrounded, but for products on tiles.
Gradients are summed in an order fixed by the shapes: results depend neither on the run nor on the
number of threads.
"""

from __future__ import annotations

from .. import _native, _native_call
from .._contract import Signature
from .._native_call import backward, forward, plan

__all__ = ["FORMS", "backward", "forward", "plan", "supports"]

FORMS = {"cpu": _native.cpu_forms(has_tiles=True)}


def supports(signature: Signature, backend: str, form: str, needs_grad: bool = True) -> str:
    """Why the kernels refuse a call; empty if they serve it."""
    norms = (signature.dimensions(f"{norm}_weight") for norm in ("pre_norm", "post_norm"))
    if _native_call.kernels_of(backend) == "cuda" and 2 in norms:
        return "its norms are one [D] for all rows, and the call has a bank of norms"
    return _native_call.supports(signature, backend, form, needs_grad)
