"""masked_weight by compiled kernels: `cuda` and `cpu`, and both simulated (csrc/ops/masked_weight).

CUDA: forward is one launch, backward two. CPU: the threshold is selected, not sorted for, and
nothing the size of the matrix is kept beside the result and the mask. Results depend neither on the
run nor on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .. import _native
from .._contract import Chosen, Value
from .._native_call import kernels_of, plan, supports
from .contract import CONTRACT

__all__ = ["FORMS", "backward", "forward", "plan", "supports"]

FORMS = {"cpu": _native.cpu_forms()}
_FACTORS = tuple(row.name for row in CONTRACT.input_rows if row.kind == "parameter")


def forward(chosen: Chosen, **inputs: Value) -> Sequence[Any]:
    """y [Dout, Din], and the mask [Dout, Din] for backward."""
    if kernels_of(chosen.backend) == "cpu":
        inputs |= _as_float32(inputs)
    return chosen.plan.forward(inputs)


def backward(chosen: Chosen, needs: dict[str, bool], **values: Value) -> dict[str, Value]:
    """The gradients that ``needs`` names, by input name."""
    if kernels_of(chosen.backend) == "cuda":
        return chosen.plan.backward(needs, values)
    wanted = {"w0": needs["w0"], **dict.fromkeys(_FACTORS, True)}
    found = chosen.plan.backward(wanted, values | _as_float32(values))
    return {name: found[name].to(values[name].dtype) for name, need in needs.items() if need}


def _as_float32(values: dict[str, Value]) -> dict[str, Value]:
    """The factors as CPU kernels take them, and write their gradients, all of them: they are small
    beside the matrix, and scores are float32 in any case.
    """
    return {name: values[name].float() for name in _FACTORS}
