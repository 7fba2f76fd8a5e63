"""prefix_attention by compiled kernels: `cuda` and `cpu`, and both simulated
(csrc/ops/prefix_attention; docs/kernels/prefix_attention.md tells which kernel leaves what for
which).

CUDA has two forms. ``single``: one kernel sees prefixes and own keys; forward is one launch,
backward two, one more where parts are summed (prefixes, a gate) and one for the gradient of a bias.
``composed``: torch's flash attention sees the own keys, and the same kernels the prefixes only:
forward starts each row where flash attention has ended, backward adds to its dq. That is two
launches forward, for long sequences, where flash attention's main loop outweighs the second pass
over q and out. On a CPU keys that the mask hides are never read, so padding costs nothing.

q, k, v and prefixes are read through their strides. Gradients are summed in a fixed order: two runs
give the same bits, on a CPU with any number of threads; except for dq in the composed form on a
GPU, where flash attention sums by atomics unless `torch.use_deterministic_algorithms` is on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .. import _native, _native_call
from .._contract import Chosen, Signature, Value
from .._native_call import Plan
from . import _flash

FORMS = {"cuda": ("single", "composed"), "cpu": _native.cpu_forms(has_tiles=True)}


def supports(signature: Signature, backend: str, form: str, needs_grad: bool = True) -> str:
    """Why the kernels cannot serve a call; empty if they can."""
    reason = _native_call.supports(signature, backend, form, needs_grad)
    if reason or form != "composed":
        return reason
    if not sum(signature.sizes.get("P_i", ())):
        return "there is no prefix to merge into flash attention's output"
    return _flash.why_not(signature)


def plan(chosen: Chosen) -> Plan:
    """What is the same for equal calls."""
    return Plan(chosen, reads_views=True)


def forward(chosen: Chosen, **inputs: Value) -> Sequence[Any]:
    """out [B, H, S, E] and log-sum-exp [B, H, S]."""
    if chosen.form != "composed" or chosen.plan.is_empty:
        return chosen.plan.forward(inputs)
    own_out, own_lse = _flash.forward(chosen, *_rows(inputs))
    outputs = chosen.plan.outputs()
    # In this form the kernels see no own keys, and read what came of them in the places of k and v.
    chosen.plan.run_forward(inputs | {"k": own_out, "v": own_lse}, outputs)
    return outputs


def backward(chosen: Chosen, needs: dict[str, bool], **values: Value) -> dict[str, Value]:
    """The gradients that ``needs`` names, by input name."""
    if chosen.form != "composed" or chosen.plan.is_empty or not any(needs[name] for name in "qkv"):
        return chosen.plan.backward(needs, values)
    dout, out = _native.dense(values["dout"]), _native.dense(values["out"])
    q, k, v = _rows(values)
    own_dq, dk, dv = _flash.backward(chosen, dout, q, k, v, out, values["lse"])
    found: dict[str, Value] = {"k": dk.contiguous(), "v": dv.contiguous()}
    ours = {name: need and name not in found for name, need in needs.items()}
    if any(ours.values()):
        values |= {"dout": dout, "out": out, "k": own_dq}  # see forward
        found |= chosen.plan.backward(ours, values)
    return {name: found[name] for name, need in needs.items() if need}


def _rows(values: dict[str, Value]) -> list[Tensor]:
    """q, k and v as flash attention takes them."""
    return [_native.readable_rows(values[name]) for name in "qkv"]
