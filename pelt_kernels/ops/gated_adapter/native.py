"""gated_adapter by compiled kernels: `cuda` and `cpu`, and both simulated (csrc/ops/gated_adapter).

CUDA: forward is one launch, backward two, on 16-bit activations. CPU: float32 and bfloat16;
float32 parameters beside bfloat16 activations are used unrounded, but for products on tiles.
Gradients are summed in an order fixed by the shapes: results depend neither on the run nor on the
number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import _native
from .._contract import Chosen, Signature, Value
from .._native_call import Plan, why_not

FORMS = {"cpu": _native.cpu_forms(has_tiles=True)}


def supports(signature: Signature, backend: str, form: str) -> str:
    """Why the kernels cannot serve a call; empty if they can."""
    return why_not(signature, backend, form)


def plan(chosen: Chosen) -> Plan:
    """What is the same for equal calls."""
    return Plan(chosen)


def forward(chosen: Chosen, **inputs: Value) -> Sequence[Any]:
    """y [B, S, D], the learned gate's value (or [0]), and h [B, S, R] for backward."""
    return chosen.plan.forward(inputs)


def backward(chosen: Chosen, needs: dict[str, bool], **values: Value) -> dict[str, Value]:
    """The gradients that ``needs`` names, by input name."""
    return chosen.plan.backward(needs, values)
