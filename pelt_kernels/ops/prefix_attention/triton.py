"""prefix_attention by Triton kernels: flash attention that streams prefix columns and keys.

See _triton_fwd.py, _triton_bwd_rows.py and _triton_bwd_columns.py for the schedules,
_triton_plan.py for the tiles. q, k and v are read where they lie if E is contiguous. Gradients are
summed in a fixed order: two runs give the same bits. Triton is imported when the first call is
served, never before. On CPU tensors the kernels run in Triton's interpreter, which is for tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._contract import Chosen, Signature, Value
from .._triton_host import (
    Config,
    dense,
    kernels_of,
    launch_fitting,
    signed,
    tune,
    unavailable,
    why_not,
    within_bounds,
)
from ._triton_plan import CANDIDATES, MAX_HEAD, Plan
from .contract import CONTRACT

__all__ = ["CANDIDATES", "backward", "forward", "plan", "supports", "tune", "unavailable"]


def supports(signature: Signature, backend: str, form: str, needs_grad: bool = True) -> str:
    """Why the kernels cannot serve a call; empty if they can."""
    b, h, s, n, e = (signature.sizes[letter] for letter in "BHSNE")
    heads = f"its registers hold heads of at most {MAX_HEAD}, and E is {e}"
    rows = "it counts rows of all heads in 32 bits, and there are 2**31 or more"
    return why_not(signature, (e > MAX_HEAD, heads), (b * h * max(s, n) >= 2**31, rows))


plan = Plan


def forward(chosen: Chosen, seed: int, **inputs: Value) -> tuple[Tensor, Tensor]:
    """out [B, H, S, E] and log-sum-exp [B, H, S]."""
    q = inputs["q"]
    out = _native.empty(q.shape, chosen.dtype, chosen.device)
    lse = _native.empty(q.shape[:3], torch.float32, chosen.device)
    if out.numel() == 0:
        return out, lse
    plan, given = chosen.plan, _Given(within_bounds(chosen, inputs))

    def launch(config: Config) -> None:
        tiles = plan.query_tiles(config)
        _kernels("fwd")._prefix_attention_fwd_kernel[(plan.b * plan.h * tiles,)](
            *given.rows, out, lse, *given.strides, plan.s, plan.n, tiles,
            *_numbers(plan, seed), **plan.constants("forward", config),
        )  # fmt: skip

    with _native.on(chosen.device):
        launch_fitting(plan.configs, "forward", launch)
    return out, lse


def backward(
    chosen: Chosen,
    needs: dict[str, bool],
    dout: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: int,
    **inputs: Value,
) -> dict[str, Value]:
    """The gradients that ``needs`` names, by input name."""
    if dout.numel() == 0:
        return {
            name: [torch.zeros_like(t) for t in value]
            if isinstance(value, (list, tuple))
            else torch.zeros_like(value)
            for name, value in ((name, inputs[name]) for name, need in needs.items() if need)
        }
    with _native.on(chosen.device):
        return _Backward(
            chosen, needs, dout.contiguous(), out.contiguous(), lse, seed, inputs
        ).run()


class _Given:
    """The inputs as kernels take them: which are there, contiguous, and their strides."""

    def __init__(self, inputs: dict[str, Value]) -> None:
        self.q, self.k, self.v = (
            t if t.stride(-1) == 1 else t.contiguous()
            for t in (inputs["q"], inputs["k"], inputs["v"])
        )
        # The others in the contract's order, which is the kernels'.
        others = [dense(inputs[name]) for name in CONTRACT.input_names[3:]]
        self.prefix_k, self.prefix_v, self.index, self.gate, *hidden = others
        self.bias = hidden[-1]
        self.hidden = tuple(hidden)  # key mask, lengths, bias
        self.qkv = (self.q, self.k, self.v)
        self.rows = (*self.qkv, *others)
        self.strides = (*self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3], 0, 0, 0)
        if self.bias is not None:
            batch, heads, s, n = self.bias.shape
            by_sample, by_head = heads * s * n * (batch > 1), s * n * (heads > 1)
            self.strides = (*self.strides[:9], by_sample, by_head, n)


class _Backward:
    """One backward: its tensors, and its launches in order."""

    def __init__(
        self,
        chosen: Chosen,
        needs: dict[str, bool],
        dout: Tensor,
        out: Tensor,
        lse: Tensor,
        seed: int,
        inputs: dict[str, Value],
    ) -> None:
        self.plan, self.given, self.inputs, self.needs = (
            chosen.plan, _Given(within_bounds(chosen, inputs)), inputs, needs
        )  # fmt: skip
        self.dout, self.out, self.lse, self.seed = dout, out, lse, seed
        self.delta = self._empty(lse.shape)
        self.grads: dict[str, Value] = {}

    def run(self) -> dict[str, Value]:
        plan, needs = self.plan, self.needs
        launch_fitting(plan.configs, "dq", self._dq)
        if needs["k"] or needs["v"]:
            launch_fitting(plan.configs, "dkv", self._dkv)
        if needs["bias"]:
            launch_fitting(plan.configs, "bias", self._bias)
        if needs["prefix_k"] or needs["prefix_v"]:
            self.grads["prefix_k"], self.grads["prefix_v"] = [], []
            for i in range(len(plan.segments)):
                self._prefix(i)
        return {name: self.grads[name] for name, need in needs.items() if need}

    def _empty(self, shape: Any, dtype: torch.dtype = torch.float32) -> Tensor:
        return _native.empty(shape, dtype, self.dout.device)

    def _dq(self, config: Config) -> None:
        plan, given, tiles = self.plan, self.given, self.plan.query_tiles(config)
        dq = self._empty(self.out.shape, self.out.dtype) if self.needs["q"] else None
        has_parts = self.needs["gate"] and plan.columns > 0
        parts = self._empty((plan.b, plan.h, tiles)) if has_parts else None
        _kernels("bwd_rows")._prefix_attention_bwd_dq_kernel[(plan.b * plan.h * tiles,)](
            *given.rows, self.out, self.lse, self.dout, self.delta, dq, parts,
            *given.strides, plan.s, plan.n, tiles, *_numbers(plan, self.seed),
            **plan.constants("dq", config),
        )  # fmt: skip
        self.grads["q"] = dq
        if self.needs["gate"]:
            gate = self.inputs["gate"]
            if parts is None:
                self.grads["gate"] = torch.zeros_like(gate)
            else:
                dgate = parts.sum(-1 if gate.ndim == 2 else (-2, -1))
                self.grads["gate"] = dgate.to(gate.dtype)

    def _dkv(self, config: Config) -> None:
        plan, given, tiles = self.plan, self.given, self.plan.key_tiles(config)
        self.grads["k"] = self._empty(given.k.shape, given.k.dtype)
        self.grads["v"] = self._empty(given.v.shape, given.v.dtype)
        if plan.n == 0:
            return
        _kernels("bwd_columns")._prefix_attention_bwd_dkv_kernel[(plan.b * plan.g * tiles,)](
            *given.qkv, *given.hidden, self.lse, self.dout, self.delta,
            self.grads["k"], self.grads["v"], *given.strides, plan.s, plan.n, tiles,
            *_numbers(plan, self.seed), **plan.constants("dkv", config),
        )  # fmt: skip

    def _bias(self, config: Config) -> None:
        plan, bias = self.plan, self.inputs["bias"]
        self.grads["bias"] = self._empty(bias.shape, bias.dtype)
        batch, heads = bias.shape[:2]
        row_tiles = plan.query_tiles(config)
        programs = batch * heads * row_tiles * plan.key_tiles(config)
        if bias.numel() == 0:
            return
        _kernels("bwd_rows")._prefix_attention_bwd_bias_kernel[(programs,)](
            *self.given.qkv, *self.given.hidden, self.lse, self.dout, self.delta,
            self.grads["bias"], *self.given.strides, plan.s, plan.n,
            1 if batch > 1 else plan.b, row_tiles, *_numbers(plan, self.seed),
            BIAS_HEADS=heads, **plan.constants("bias", config),
        )  # fmt: skip

    def _prefix(self, i: int) -> None:
        """The gradients of one segment, from the parts of its shares."""
        plan, given, segment = self.plan, self.given, self.plan.segments[i]
        keys, values = self.inputs["prefix_k"][i], self.inputs["prefix_v"][i]
        shift = segment.begin % 4 if plan.has_dropout else 0
        block_p = plan.block_p(segment.length + shift)
        tiles = -(-(segment.length + shift) // block_p)
        parts: list[Tensor] = []

        def launch(config: Config) -> None:
            shares, units_per_share, spans, span = plan.shares(config, tiles, segment.members)
            shape = (2, shares, segment.members, segment.length, plan.g, plan.e)
            parts[:] = [self._empty(shape)]
            programs = shares * segment.members * plan.g * tiles
            _kernels("bwd_columns")._prefix_attention_bwd_prefix_kernel[(programs,)](
                given.q, given.prefix_k[i], given.prefix_v[i], given.index[i], given.gate,
                self.lse, self.dout, self.delta, *parts[0].unbind(), *given.strides[:3],
                plan.s, plan.columns + plan.n, segment.members, plan.b * spans, units_per_share,
                spans, span, *_numbers(plan, self.seed),
                LENGTH=segment.length, BEGIN=segment.begin, SHIFT=shift, BLOCK_P=block_p,
                **plan.constants("prefix", config),
            )  # fmt: skip

        if segment.length and segment.members:
            launch_fitting(plan.configs, "prefix", launch)
            # Two sums, since the results of an operator may not share memory.
            dk, dv = (part.sum(0) for part in parts[0])
            self.grads["prefix_k"].append(dk.view_as(keys).to(keys.dtype))
            self.grads["prefix_v"].append(dv.view_as(values).to(values.dtype))
        else:
            self.grads["prefix_k"].append(torch.zeros_like(keys))
            self.grads["prefix_v"].append(torch.zeros_like(values))


def _numbers(plan: Plan, seed: int) -> tuple[Any, ...]:
    """The scale, and dropout's seed, threshold and factor."""
    return (plan.signature.attributes["scale"], *signed(seed), *plan.dropout)


_kernels = kernels_of(__package__)
