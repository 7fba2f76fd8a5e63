"""symmetric_kl by compiled kernels: `cuda` and `cpu`, and both simulated (csrc/ops/symmetric_kl).

CUDA: forward and backward are one launch each. CPU: forward reads the logits once, backward a
second time, rows through their strides. Rows that do not count are not read. Results depend neither
on the run nor on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import _native
from .._contract import Chosen, Signature, Value
from .._native_call import Plan, kernels_of, why_not

FORMS = {"cpu": _native.cpu_forms()}


def supports(signature: Signature, backend: str, form: str) -> str:
    """Why the kernels cannot serve a call; empty if they can."""
    return why_not(signature, backend, form)


def plan(chosen: Chosen) -> Plan:
    """What is the same for equal calls."""
    return Plan(chosen, reads_views=kernels_of(chosen.backend) == "cpu")


def forward(chosen: Chosen, **inputs: Value) -> Sequence[Any]:
    """The loss [], and both log-sum-exps [2, T] for backward (0 where a row does not count)."""
    return chosen.plan.forward(inputs)


def backward(chosen: Chosen, needs: dict[str, bool], **values: Value) -> dict[str, Value]:
    """The gradients that ``needs`` names: ±0.5 (p1 - p2) / count."""
    return chosen.plan.backward(needs, values)
