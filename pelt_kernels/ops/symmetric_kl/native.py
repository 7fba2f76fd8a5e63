"""symmetric_kl by compiled kernels: `cuda` and `cpu`, and both simulated (csrc/ops/symmetric_kl).

CUDA: forward and backward are one launch each. CPU: forward reads the logits once, backward a
second time, rows through their strides. Rows that do not count are not read. Results depend neither
on the run nor on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import _native
from .._contract import Call, Value
from .._native_call import Plan, kernels_of, why_not

FORMS = {"cpu": _native.cpu_forms()}


def supports(call: Call) -> str:
    """Why the kernels cannot serve a call; empty if they can."""
    return why_not(call)


def plan(call: Call) -> Plan:
    """What is the same for equal calls."""
    return Plan(call, reads_views=kernels_of(call.backend) == "cpu")


def forward(call: Call, **inputs: Value) -> Sequence[Any]:
    """The loss [], and both log-sum-exps [2, T] for backward (0 where a row does not count)."""
    return call.plan.forward(inputs)


def backward(call: Call, needs: dict[str, bool], **values: Value) -> dict[str, Value]:
    """The gradients that ``needs`` names: ±0.5 (p1 - p2) / count."""
    return call.plan.backward(needs, values)
