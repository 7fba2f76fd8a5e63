"""prefix_attention by the hand-written CUDA kernels: on a GPU (`cuda`), or on CPU tensors by the
simulator (`cuda_sim`).

Two forms. ``single``: one kernel sees prefixes and own keys; forward is one launch, backward two,
one more where parts are summed (prefixes, a gate) and one for the gradient of a bias (see
csrc/ops/prefix_attention). ``composed``: torch's flash attention sees the own keys, and the same
kernels the prefixes only: forward starts each row where flash attention has ended, backward adds
to its dq. That is two launches forward, for long sequences, where flash attention's main loop
outweighs the second pass over q and out.

q, k, v and prefixes are read through their strides where rows start at 16-byte borders, and copied
first where they do not. Gradients are summed in a fixed order: two runs give the same bits, except
for dq in the composed form on a GPU, where flash attention sums by atomics unless
`torch.use_deterministic_algorithms` is on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._contract import Call, Value
from . import _flash

FORMS = ("single", "composed")

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_SIXTY_FOUR_BITS = 0xFFFFFFFFFFFFFFFF


def supports(call: Call) -> str:
    """Why the kernels cannot serve a call; empty if they can. Decided by the C++ side, which knows
    its configurations.
    """
    library = _native.library_of(call.backend)
    if not hasattr(library, "prefix_attention_why_not"):
        return "the compiled module was built without its CUDA kernels"
    if call.dtype not in _DTYPES:
        return f"its matrix products take float16 or bfloat16 activations, and q is {call.dtype}"
    sizes = {letter: call.sizes[letter] for letter in "BHSNE"}
    prefix = sum(call.sizes.get("P_i", ()))
    reason = library.prefix_attention_why_not(dtype=_DTYPES[call.dtype], P=prefix, **sizes)
    if reason or call.form != "composed":
        return reason
    if not prefix:
        return "there is no prefix to merge into flash attention's output"
    return _flash.why_not(call)


def forward(call: Call, seed: int, **inputs: Value) -> tuple[Tensor, Tensor]:
    """out [B, H, S, E] and log-sum-exp [B, H, S]."""
    shape = inputs["q"].shape
    out = _native.empty(shape, call.dtype, call.device)
    lse = _native.empty(shape[:3], torch.float32, call.device)
    if out.numel() == 0:
        return out, lse
    own: dict[str, Any] = {}
    with _native.on(call.device) as stream:
        if call.form == "composed":
            inputs.update({name: _readable(inputs[name]) for name in "qkv"})
            own_out, own_lse = _flash.forward(call, inputs["q"], inputs["k"], inputs["v"])
            own_out, own_lse = _readable(own_out), own_lse.contiguous()
            own = {
                "own_out": own_out.data_ptr(), "own_lse": own_lse.data_ptr(),
                "own_out_strides": own_out.stride()[:3],
            }  # fmt: skip
        tensors, strides, borrowed = _addresses(inputs)
        _plan_of(call, inputs).forward(
            tensors=tensors, strides=strides, out=out.data_ptr(), lse=lse.data_ptr(),
            seed=seed & _SIXTY_FOUR_BITS, stream=stream, **own,
        )  # fmt: skip
        del borrowed
    return out, lse


def backward(
    call: Call,
    needs: dict[str, bool],
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: int,
    **inputs: Value,
) -> dict[str, Value]:
    """The gradients that ``needs`` names, by input name."""
    names = [name for name, need in needs.items() if need]
    if out.numel() == 0:
        return {name: _zeroed(_empty_like(inputs[name])) for name in names}
    dout, out = _native.dense(dout), _native.dense(out)
    found: dict[str, Value] = {}
    own: dict[str, Any] = {}
    if call.form == "composed" and any(needs[name] for name in "qkv"):
        inputs.update({name: _readable(inputs[name]) for name in "qkv"})
        own_dq, dk, dv = _flash.backward(
            call, dout, inputs["q"], inputs["k"], inputs["v"], out, lse
        )
        found = {"k": dk.contiguous(), "v": dv.contiguous()}
        own_dq = _readable(own_dq)
        own = {"own_dq": own_dq.data_ptr(), "own_dq_strides": own_dq.stride()[:3]}
    by_us = {name: _empty_like(inputs[name]) for name in names if name not in found}
    if by_us:
        _launch_backward(call, by_us, dout, out, lse, seed, inputs, own)
    found.update(by_us)
    return {name: found[name] for name in names}


def _launch_backward(
    call: Call,
    grads: dict[str, Value],
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: int,
    inputs: dict[str, Value],
    own: dict[str, Any],
) -> None:
    """Our kernels' part: fills ``grads``, by input name."""
    wanted = [_native.pointer(grads.get(name)) for name in ("q", "k", "v", "gate", "bias")]
    for i in range(len(inputs["prefix_k"])):
        wanted += [
            grads[name][i].data_ptr() if name in grads else 0 for name in ("prefix_k", "prefix_v")
        ]
    plan = _plan_of(call, inputs)
    with _native.on(call.device) as stream:
        tensors, strides, borrowed = _addresses(inputs)
        workspace = _native.workspace(plan.backward_workspace_bytes(grads=wanted), call.device)
        plan.backward(
            tensors=tensors, strides=strides, grads=wanted, dout=dout.data_ptr(),
            out=out.data_ptr(), lse=lse.data_ptr(), workspace=_native.pointer(workspace),
            seed=seed & _SIXTY_FOUR_BITS, stream=stream, **own,
        )  # fmt: skip
        del borrowed


def _empty_like(value: Value) -> Value:
    """Memory for a gradient, or for each of a list."""
    if isinstance(value, list):
        return [_empty_like(v) for v in value]
    return _native.empty(value.shape, value.dtype, value.device)


def _zeroed(value: Value) -> Value:
    return [v.zero_() for v in value] if isinstance(value, list) else value.zero_()


def _addresses(
    inputs: dict[str, Value],
) -> tuple[list[int], list[tuple[int, ...]], list[Tensor]]:
    """Addresses and strides in the order of the C++ side, and tensors that have to live until the
    launches are made.
    """
    borrowed: list[Tensor] = []
    strides: list[tuple[int, ...]] = []

    def rows(tensor: Tensor) -> int:
        tensor = _readable(tensor)
        borrowed.append(tensor)
        strides.append(tensor.stride()[:3])
        return tensor.data_ptr()

    def prefix_rows(tensor: Tensor) -> int:
        """[P_i, G, E] | [A_i, P_i, G, E]: strides of a member, a head and a row."""
        address = rows(tensor)
        steps = borrowed[-1].stride()
        strides[-1] = (steps[0] if len(steps) == 4 else 0, steps[-2], steps[-3])
        return address

    def dense(tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        borrowed.append(_native.dense(tensor))
        return borrowed[-1].data_ptr()

    addresses = [rows(inputs["q"]), rows(inputs["k"]), rows(inputs["v"])]
    addresses += [dense(inputs[name]) for name in ("gate", "key_mask", "lengths", "bias")]
    prefixes = zip(inputs["prefix_k"], inputs["prefix_v"], inputs["prefix_index"])
    for keys, values, index in prefixes:
        addresses += [prefix_rows(keys), prefix_rows(values), dense(index)]
    return addresses, strides, borrowed


def _readable(tensor: Tensor) -> Tensor:
    """The tensor, copied unless its last stride is 1 and its rows start at 16-byte borders."""
    *steps, last = tensor.stride()
    vector = 16 // tensor.element_size()
    if last == 1 and tensor.data_ptr() % 16 == 0:
        for step, size in zip(steps, tensor.shape):
            if step % vector and size > 1:
                break
        else:
            return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


# What is the same for every call of one kind, by the identity of what the dispatch keeps.
_plans: dict[int, tuple[Call, Any]] = {}


def _plan_of(call: Call, inputs: dict[str, Value]) -> Any:
    found = _plans.get(id(call))
    if found is None or found[0] is not call:
        if len(_plans) >= 4096:  # as many as the contract keeps calls
            _plans.clear()
        found = _plans[id(call)] = (call, _plan(call, inputs))
    return found[1]


def _plan(call: Call, inputs: dict[str, Value]) -> Any:
    """The kernels' description of a call without its tensors."""
    at, gate, bias = call.attributes, inputs["gate"], inputs["bias"]
    sizes = dict(call.sizes, N=0) if call.form == "composed" else call.sizes

    def is_float32(tensor: Tensor | None) -> bool:
        return tensor is not None and tensor.dtype != call.dtype

    prefixes = [
        (keys.shape[0] if keys.ndim == 4 else 1, keys.shape[-3], is_float32(keys),
         is_float32(values))
        for keys, values in zip(inputs["prefix_k"], inputs["prefix_v"])
    ]  # fmt: skip
    batch, heads, s, n = (1, 1, 0, 0) if bias is None else bias.shape
    return _native.library_of(call.backend).PrefixAttention(
        dtype=_DTYPES[call.dtype],
        sizes=[sizes[letter] for letter in "BHGSNE"],
        prefixes=prefixes,
        is_gate_float32=is_float32(gate),
        has_gate_per_head=gate is not None and gate.ndim == 2,
        is_bias_float32=is_float32(bias),
        bias_strides=(0 if batch == 1 else heads * s * n, 0 if heads == 1 else s * n),
        is_dbias_shared=(batch == 1, heads == 1),
        is_causal=at["is_causal"] and sizes["N"] > 0,
        scale=at["scale"],
        dropout_p=at["dropout_p"],
    )
