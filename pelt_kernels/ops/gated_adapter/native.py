"""gated_adapter by compiled kernels: `cuda` and `cpu`, and both simulated (csrc/ops/gated_adapter).

CUDA: forward is one launch, backward two, on 16-bit activations. CPU: float32 and bfloat16;
float32 parameters beside bfloat16 activations are used unrounded, but for products on tiles.
Gradients are summed in an order fixed by the shapes: results depend neither on the run nor on the
number of threads.
"""

from __future__ import annotations

from .. import _native
from .._native_call import backward, forward, plan, supports

__all__ = ["FORMS", "backward", "forward", "plan", "supports"]

FORMS = {"cpu": _native.cpu_forms(has_tiles=True)}
