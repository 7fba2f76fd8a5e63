"""symmetric_kl by compiled kernels: `cuda` and `cpu`, and both simulated (csrc/ops/symmetric_kl).

CUDA: forward and backward are one launch each. CPU: forward reads the logits once, backward a
second time, rows through their strides. Rows that do not count are not read. Results depend neither
on the run nor on the number of threads.
"""

from __future__ import annotations

from .. import _native
from .._native_call import backward, forward, plan, supports

__all__ = ["FORMS", "backward", "forward", "plan", "supports"]

FORMS = {"cpu": _native.cpu_forms()}
