"""prefix_attention by the hand-written CUDA kernels: on a GPU (`cuda`), or on CPU tensors by the
simulator (`cuda_sim`).

Forward is one launch; backward two, one more where parts are summed (prefixes, a gate) and one for
the gradient of a bias (see csrc/ops/prefix_attention). q, k and v are read through their strides
where rows start at 16-byte borders, and copied first where they do not. Gradients are summed in a
fixed order: two runs give the same bits.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._contract import Call, Value

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def _library(call: Call) -> ModuleType:
    return _native.library("_C_sim" if call.backend == "cuda_sim" else "_C")


def supports(call: Call) -> str:
    """Why the kernels cannot serve a call; empty if they can. Decided by the C++ side, which knows
    its configurations.
    """
    library = _library(call)
    if not hasattr(library, "prefix_attention_why_not"):
        return "the compiled module was built without its CUDA kernels"
    if call.dtype not in _DTYPES:
        return f"its matrix products take float16 or bfloat16 activations, and q is {call.dtype}"
    sizes = {letter: call.sizes[letter] for letter in "BHSNE"}
    return library.prefix_attention_why_not(
        dtype=_DTYPES[call.dtype], P=sum(call.sizes.get("P_i", ())), **sizes
    )


def forward(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: list[Tensor],
    prefix_v: list[Tensor],
    prefix_index: list[Tensor | None],
    gate: Tensor | None,
    key_mask: Tensor | None,
    lengths: Tensor | None,
    bias: Tensor | None,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """out [B, H, S, E] and log-sum-exp [B, H, S]."""
    out = _native.empty(q.shape, call.dtype, call.device)
    lse = _native.empty(q.shape[:3], torch.float32, call.device)
    if out.numel() == 0:
        return out, lse
    with _native.on(call.device) as stream:
        inputs, borrowed = _inputs(
            call, q, k, v, prefix_k, prefix_v, prefix_index, gate, key_mask, lengths, bias, seed
        )
        _library(call).prefix_attention_fwd(
            inputs=inputs, out=out.data_ptr(), lse=lse.data_ptr(), stream=stream
        )
        del borrowed
    return out, lse


def backward(
    call: Call,
    needs: dict[str, bool],
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: list[Tensor],
    prefix_v: list[Tensor],
    prefix_index: list[Tensor | None],
    gate: Tensor | None,
    key_mask: Tensor | None,
    lengths: Tensor | None,
    bias: Tensor | None,
    seed: int,
) -> dict[str, Value]:
    """The gradients that ``needs`` names, by input name."""
    inputs = {
        "q": q, "k": k, "v": v, "prefix_k": prefix_k, "prefix_v": prefix_v, "gate": gate,
        "bias": bias,
    }  # fmt: skip
    grads = {name: _empty_like(inputs[name]) for name, need in needs.items() if need}
    if out.numel() == 0:
        return {name: _zeroed(grad) for name, grad in grads.items()}

    def typed(tensor: Tensor | None) -> tuple[int, bool]:
        return _native.pointer(tensor), tensor is not None and tensor.dtype != call.dtype

    nothing = [None] * len(prefix_k)
    dbias = grads.get("bias")
    with _native.on(call.device) as stream:
        arguments, borrowed = _inputs(
            call, q, k, v, prefix_k, prefix_v, prefix_index, gate, key_mask, lengths, bias, seed
        )
        launches = _library(call).PrefixAttentionBackward(
            inputs=arguments, dout=_aligned(dout, borrowed), out=_aligned(out, borrowed),
            lse=lse.data_ptr(), dq=_native.pointer(grads.get("q")),
            dk=_native.pointer(grads.get("k")), dv=_native.pointer(grads.get("v")),
            dprefixes=[
                (typed(dk), typed(dv))
                for dk, dv in zip(grads.get("prefix_k", nothing), grads.get("prefix_v", nothing))
            ],
            dgate=typed(grads.get("gate")), dbias=typed(dbias),
            is_dbias_shared=(False, False) if dbias is None else (
                dbias.shape[0] == 1, dbias.shape[1] == 1
            ),
        )  # fmt: skip
        workspace = _native.workspace(launches.workspace_bytes, call.device)
        launches.launch(workspace=_native.pointer(workspace), stream=stream)
        del borrowed
    return grads


def _empty_like(value: Value) -> Value:
    """Memory for a gradient, or for each of a list."""
    if isinstance(value, list):
        return [_empty_like(v) for v in value]
    return _native.empty(value.shape, value.dtype, value.device)


def _zeroed(value: Value) -> Value:
    return [v.zero_() for v in value] if isinstance(value, list) else value.zero_()


def _aligned(tensor: Tensor, borrowed: list[Tensor]) -> int:
    borrowed.append(_native.dense(tensor))
    return borrowed[-1].data_ptr()


def _rows(tensor: Tensor) -> Tensor:
    """The tensor as the kernels read it: rows of E elements that start at 16-byte borders; copied
    if they do not.
    """
    steps = (s for s, size in zip(tensor.stride()[:-1], tensor.shape) if size > 1)
    is_readable = (
        tensor.stride(-1) == 1
        and tensor.data_ptr() % 16 == 0
        and all(step % 8 == 0 for step in steps)
    )
    return tensor if is_readable else tensor.clone(memory_format=torch.contiguous_format)


def _inputs(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefix_k: list[Tensor],
    prefix_v: list[Tensor],
    prefix_index: list[Tensor | None],
    gate: Tensor | None,
    key_mask: Tensor | None,
    lengths: Tensor | None,
    bias: Tensor | None,
    seed: int,
) -> tuple[Any, list[Tensor]]:
    """The C++ side's view of a call, and tensors that have to live until its launches are made."""
    at, sizes = call.attributes, call.sizes
    q, k, v = _rows(q), _rows(k), _rows(v)
    borrowed = [q, k, v]

    def dense(tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        borrowed.append(_native.dense(tensor))
        return borrowed[-1].data_ptr()

    def typed(tensor: Tensor | None) -> tuple[int, bool]:
        return dense(tensor), tensor is not None and tensor.dtype != call.dtype

    prefixes = [
        (
            typed(keys), typed(values), dense(index),
            keys.shape[0] if keys.ndim == 4 else 1, keys.shape[-3],
        )
        for keys, values, index in zip(prefix_k, prefix_v, prefix_index)
    ]  # fmt: skip
    bias_strides = (0, 0)
    if bias is not None:
        batch, heads, s, n = bias.shape
        bias_strides = (0 if batch == 1 else heads * s * n, 0 if heads == 1 else s * n)
    inputs = _library(call).PrefixAttentionInputs(
        dtype=_DTYPES[call.dtype],
        sizes=[sizes[letter] for letter in "BHGSNE"],
        q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(),
        q_strides=q.stride()[:3], k_strides=k.stride()[:3], v_strides=v.stride()[:3],
        prefixes=prefixes, gate=typed(gate),
        has_gate_per_head=gate is not None and gate.ndim == 2,
        key_mask=dense(key_mask), lengths=dense(lengths), bias=typed(bias),
        bias_strides=bias_strides, is_causal=at["is_causal"], scale=at["scale"],
        dropout_p=at["dropout_p"], seed=seed & 0xFFFFFFFFFFFFFFFF,
    )  # fmt: skip
    return inputs, borrowed
