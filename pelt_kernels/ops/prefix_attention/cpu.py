"""prefix_attention by the fused C++ kernels (csrc/ops/prefix_attention/fused_cpu.cpp).

Keys that the mask hides are never read, so padding costs nothing. Every sum has an order fixed by
the shapes: results depend neither on the run nor on the number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native, _philox
from .._contract import Call, Value

FORMS = _native.cpu_forms(has_tiles=True)
_DTYPES = (torch.float32, torch.bfloat16)
# Shared prefixes sum their gradients over the batch: in this many parts at most, one after the
# other within each. More parts are more work for more threads, and more memory.
_CHUNKS = 8


def supports(call: Call) -> str:
    """Why the kernels cannot serve a call; empty if they can."""
    if reason := _native.why_not_cpu(call.backend, "prefix_attention_cpu_fwd"):
        return reason
    if call.dtype not in _DTYPES:
        return f"it takes float32 or bfloat16, and q is {str(call.dtype).removeprefix('torch.')}"
    if call.form == _native.TILES and call.dtype != torch.bfloat16:
        return f"its tiles multiply bfloat16, and q is {str(call.dtype).removeprefix('torch.')}"
    return ""


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
    prefixes = [(*pair, None, None) for pair in zip(prefix_k, prefix_v, prefix_index)]
    inputs, borrowed = _inputs(call, q, k, v, prefixes, gate, key_mask, lengths, bias, seed)
    _native.library_of(call.backend).prefix_attention_cpu_fwd(
        inputs=inputs, out=out.data_ptr(), lse=lse.data_ptr()
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
    sizes = call.sizes
    dbias = None
    if bias is not None and needs["bias"]:
        shape = (bias.shape[0], sizes["H"], sizes["S"], sizes["N"])
        dbias = torch.zeros(shape, device=call.device)
    # A table's rows and a bias that all samples share belong to no part of the batch: beside them
    # there is a single part.
    is_whole = any(index is not None for index in prefix_index) or (
        dbias is not None and dbias.shape[0] == 1
    )
    chunks = 1 if is_whole else max(1, min(sizes["B"], _CHUNKS))
    sums = [
        [
            torch.zeros(t.shape if index is not None else (chunks, *t.shape), device=call.device)
            for t, index in zip(tensors, prefix_index)
        ]
        for tensors in (prefix_k, prefix_v)
    ]
    dq = _native.empty(q.shape, call.dtype, call.device)
    dk = _native.empty(k.shape, call.dtype, call.device)
    dv = _native.empty(v.shape, call.dtype, call.device)
    dgate = None
    if gate is not None:
        dgate = _native.empty((sizes["B"], sizes["H"]), torch.float32, call.device)
    prefixes = list(zip(prefix_k, prefix_v, prefix_index, *sums))
    inputs, borrowed = _inputs(call, q, k, v, prefixes, gate, key_mask, lengths, bias, seed)
    _native.library_of(call.backend).prefix_attention_cpu_bwd(
        inputs=inputs, dout=dout.data_ptr(), out=out.data_ptr(), lse=lse.data_ptr(),
        dq=dq.data_ptr(), dk=dk.data_ptr(), dv=dv.data_ptr(), dgate=_native.pointer(dgate),
        dbias=_native.pointer(dbias), chunks=chunks,
    )  # fmt: skip
    del borrowed
    grads: dict[str, Value] = {"q": dq, "k": dk, "v": dv}
    for name, tensors, parts in zip(("prefix_k", "prefix_v"), (prefix_k, prefix_v), sums):
        grads[name] = [
            (part if index is not None else part.sum(0)).to(tensor.dtype)
            for tensor, part, index in zip(tensors, parts, prefix_index)
        ]
    if gate is not None and dgate is not None:
        grads["gate"] = (dgate if gate.ndim == 2 else dgate.sum(1)).to(gate.dtype)
    if bias is not None and dbias is not None:
        grads["bias"] = (dbias.sum(1, True) if bias.shape[1] == 1 else dbias).to(bias.dtype)
    return {name: grads[name] for name, need in needs.items() if need}


def _bias_strides(bias: Tensor) -> tuple[int, int]:
    """Of the batch and the heads in a contiguous bias, in elements; 0 where one serves all."""
    batch, heads, s, n = bias.shape
    return 0 if batch == 1 else heads * s * n, 0 if heads == 1 else s * n


def _inputs(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    prefixes: list[tuple[Any, ...]],
    gate: Tensor | None,
    key_mask: Tensor | None,
    lengths: Tensor | None,
    bias: Tensor | None,
    seed: int,
) -> tuple[Any, list[Tensor]]:
    """The C++ side's view of a call, and tensors that have to live as long as it."""
    at, sizes = call.attributes, call.sizes
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    borrowed = [q, k, v]

    def dense(tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        borrowed.append(tensor.contiguous())
        return borrowed[-1].data_ptr()

    def typed(tensor: Tensor | None) -> tuple[int, bool]:
        return dense(tensor), tensor is not None and tensor.dtype == torch.float32

    segments = [
        (typed(keys), typed(values), dense(index), keys.shape[-3],
         _native.pointer(dk), _native.pointer(dv))
        for keys, values, index, dk, dv in prefixes
    ]  # fmt: skip
    p = at["dropout_p"]
    inputs = _native.library_of(call.backend).PrefixAttentionCpuInputs(
        isa=call.form, is_float32=call.dtype == torch.float32,
        sizes=[sizes[letter] for letter in "BHGSNE"],
        q=q.data_ptr(), k=k.data_ptr(), v=v.data_ptr(),
        q_strides=q.stride()[:3], k_strides=k.stride()[:3], v_strides=v.stride()[:3],
        prefixes=segments, gate=typed(gate), has_gate_per_head=gate is not None and gate.ndim == 2,
        key_mask=dense(key_mask), lengths=dense(lengths), bias=typed(bias),
        bias_strides=(0, 0) if bias is None else _bias_strides(bias), is_causal=at["is_causal"],
        scale=at["scale"], kept=1.0 / (1.0 - p), threshold=_philox.threshold(p),
        seed=seed & 0xFFFFFFFFFFFFFFFF, threads=torch.get_num_threads(),
    )  # fmt: skip
    return inputs, borrowed
