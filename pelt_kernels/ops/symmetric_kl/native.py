"""symmetric_kl by compiled kernels: `cuda` and `cpu`, and both simulated (csrc/ops/symmetric_kl).

CUDA: forward and backward are one launch each. CPU: forward reads the logits once, backward a
second time, rows through their strides. Rows that do not count are not read. Results depend neither
on the run nor on the number of threads.
"""

from __future__ import annotations

from .. import _native
from .._contract import Chosen
from .._native_call import Plan, backward, forward, kernels_of, supports

__all__ = ["FORMS", "backward", "forward", "plan", "supports"]

FORMS = {"cpu": _native.cpu_forms()}


def plan(chosen: Chosen) -> Plan:
    """What is the same for equal calls."""
    return Plan(chosen, reads_views=kernels_of(chosen.backend) == "cpu")
