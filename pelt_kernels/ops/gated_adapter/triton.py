"""gated_adapter by Triton kernels, for GPUs that the hand-written ones do not serve.

See _triton_fwd.py and _triton_bwd_rows.py for the schedules, _triton_plan.py for the tiles. Tensors
that are not contiguous are copied first. Gradients are summed in a fixed order: two runs give the
same bits. Triton is imported when the first call is served, never before. On CPU tensors the
kernels run in Triton's interpreter, which is for tests: it needs TRITON_INTERPRET=1 before Triton
is first imported.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _native, _triton_host
from .._contract import Call, Value
from .._triton_host import (
    DTYPES,
    Config,
    options_of,
    signed,
    unavailable,
)
from ._triton_plan import CANDIDATES, PARTS, layout_of, part_sizes, plan_of, shares_of
from .contract import CONTRACT

__all__ = ["CANDIDATES", "backward", "forward", "plan_of", "supports", "tune", "unavailable"]

_MAX_RANK = 256  # above, ptxas spills the accumulators of the weights' gradients
_RESIDUAL, _GATE_WEIGHT, _GATE_BIAS = (
    CONTRACT.input_names.index(name) for name in ("residual", "gate_weight", "gate_bias")
)


def supports(call: Call) -> str:
    """Why the kernels cannot serve a call; empty if they can."""
    if call.dtype not in DTYPES:
        return (
            "it takes float32, float16 or bfloat16, and x is"
            f" {str(call.dtype).removeprefix('torch.')}"
        )
    if call.sizes["R"] > _MAX_RANK:
        return (
            f"its registers hold the sums for a bottleneck of at most {_MAX_RANK}, and R is"
            f" {call.sizes['R']}"
        )
    if call.sizes["B"] * call.sizes["S"] >= 2**31:
        return "it counts rows in 32 bits, and there are 2**31 or more"
    return unavailable(call.device)


def forward(call: Call, seed: int, **inputs: Value) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, S, D], the learned gate's value (or [0]), and h [B, S, R] for backward."""
    shapes = CONTRACT.output_shapes(call)
    y = _native.empty(shapes["y"], call.dtype, call.device)
    gate_value = _native.empty(shapes["gate_value"], torch.float32, call.device)
    h = _native.empty(shapes["h"], call.dtype, call.device)
    if y.numel() == 0:
        return y, gate_value.zero_(), h
    plan = plan_of(call, inputs)
    given = [_contiguous(inputs[name]) for name in CONTRACT.input_names]
    if call.attributes["residual_from"] == "input":
        given[_RESIDUAL] = given[0]
    ungated = given.copy()  # for a launch that finds the rows' gates in memory
    ungated[_GATE_WEIGHT] = ungated[_GATE_BIAS] = None
    row_gate = gate_value
    if plan.is_pooled:
        row_gate = _native.empty(shapes["y"][:2], torch.float32, call.device)
    kernel = _kernels("fwd")._gated_adapter_fwd_kernel
    with _native.on(call.device):
        for part, reads_gates in plan.parts:
            tensors = (*(ungated if reads_gates else given), y, gate_value, h, row_gate)
            more = {
                "POOLING": call.attributes["pooling"],
                "GATE_PER_ROW": plan.has_gate_per_row,
                "PART": part,
                "READS_GATES": reads_gates,
                "HAS_SKIP": plan.has_skip and part != "gates",
                **plan.constants,
            }

            def launch(config: Config, tensors: Any = tensors, more: Any = more) -> None:
                tiles = -(-plan.rows // config.block_t)
                kernel[(plan.groups * tiles,)](
                    *tensors, plan.rows, call.sizes["S"], tiles, *plan.numbers,
                    *signed(seed), *plan.dropout, **more, **options_of(config),
                )  # fmt: skip

            plan.launch("forward", launch)
    return y, gate_value, h


def backward(
    call: Call,
    needs: dict[str, bool],
    dy: Tensor,
    gate_value: Tensor,
    h: Tensor,
    seed: int,
    **inputs: Value,
) -> dict[str, Value]:
    """The gradients that ``needs`` names, by input name."""
    grads: dict[str, Value] = {}
    for name, need in needs.items():
        if need:
            like = inputs[name]
            grads[name] = _native.empty(like.shape, like.dtype, like.device)
    if dy.numel() == 0:
        return {name: grad.zero_() for name, grad in grads.items()}
    with _native.on(call.device):
        _Backward(call, inputs, grads, dy.contiguous(), gate_value, h.contiguous(), seed).run()
    return grads


def tune(
    call: Call, measure: Callable[[Callable[[], object]], float], **inputs: Value
) -> dict[str, Config]:
    """See `_triton_host.tune`."""
    return _triton_host.tune(sys.modules[__name__], call, measure, inputs)


class _Backward:
    """One backward: its tensors, and its launches in order."""

    def __init__(
        self,
        call: Call,
        inputs: dict[str, Value],
        grads: dict[str, Value],
        dy: Tensor,
        gate_value: Tensor,
        h: Tensor,
        seed: int,
    ) -> None:
        self.call, self.plan, self.grads = call, plan_of(call, inputs), grads
        self.given = {name: _contiguous(inputs[name]) for name in CONTRACT.input_names}
        self.gate = gate_value if self.plan.is_learned else self.given["gate"]
        self.dy, self.h = dy, h
        self.dropout = (*signed(seed), *self.plan.dropout)
        rows = call.sizes["B"] * call.sizes["S"]
        self.dh = _native.empty(h.shape, call.dtype, call.device)
        fields = _kernels("bwd_rows").FIELDS
        self.fields = _native.empty((fields, rows), torch.float32, call.device)
        self.pool = None
        if self.plan.is_pooled:
            self.pool = _native.empty((call.sizes["B"],), torch.float32, call.device)

    def run(self) -> None:
        self.plan.launch("rows", self._rows)
        if self.pool is not None or ("gate" in self.grads and not self.plan.has_gate_per_row):
            self._pool()
        wanted = {name for name in self.grads if name in PARTS}
        if wanted or "x" in self.grads:
            self.plan.launch("columns", self._columns)
        if wanted:
            self._sum()

    def _rows(self, config: Config) -> None:
        plan, given, sizes = self.plan, self.given, self.call.sizes
        tiles = -(-plan.shared_rows // config.block_t)
        dgate = self.grads.get("gate") if plan.has_gate_per_row else None
        _kernels("bwd_rows")._gated_adapter_bwd_rows_kernel[(plan.shared_groups * tiles,)](
            *(given[name] for name in _ROWS_INPUTS), self.gate,
            given["gate_weight"], given["gate_bias"], given["mask"],
            self.dy, self.h, self.dh, self.fields, dgate,
            plan.shared_rows, sizes["S"], tiles, *plan.numbers, self.fields.shape[1],
            *self.dropout, POOLING=self.call.attributes["pooling"],
            GATE_PER_ROW=plan.has_value_per_row, HAS_SKIP=plan.has_skip,
            **plan.constants, **options_of(config),
        )  # fmt: skip

    def _pool(self) -> None:
        sizes, at = self.call.sizes, self.call.attributes
        dgate = None if self.plan.is_learned else self.grads["gate"]
        _kernels("bwd_rows")._gated_adapter_bwd_pool_kernel[(sizes["B"],)](
            self.fields, self.given["mask"], self.given["scale"], dgate, self.pool,
            sizes["S"], at["scale_value"], POOLING=at["pooling"],
            BLOCK=256,
        )  # fmt: skip

    def _columns(self, config: Config) -> None:
        plan, given, call = self.plan, self.given, self.call
        chunks = -(-call.sizes["D"] // config.block_d)
        self.shares, rows_per_share = shares_of(call, plan, config, chunks)
        wanted = tuple(self.grads)
        if wanted not in plan.layouts:
            plan.layouts[wanted] = layout_of(call, self.grads)
        self.layout = plan.layouts[wanted]
        part_count = plan.shared_groups * self.shares
        self.parts = _native.empty(
            (part_count, self.layout["PART_SIZE"]), torch.float32, call.device
        )
        at = call.attributes
        _kernels("bwd_columns")._gated_adapter_bwd_columns_kernel[(chunks * part_count,)](
            *(given[name] for name in _COLUMNS_INPUTS), self.gate, given["gate_weight"],
            self.dy, self.h, self.dh, self.fields, self.pool, self.grads.get("x"), self.parts,
            plan.shared_rows, call.sizes["S"], self.shares, at["scale_value"], at["skip_below"],
            self.fields.shape[1], rows_per_share, *self.dropout, RESIDUAL=at["residual_from"],
            GATE_PER_ROW=plan.has_value_per_row, HAS_SKIP=plan.has_skip,
            **self.layout, **plan.constants, **options_of(config),
        )  # fmt: skip

    def _sum(self) -> None:
        plan, call, sizes = self.plan, self.call, self.call.sizes
        members = {"w_down": sizes.get("M", 1), "w_up": sizes.get("M_up", 1)}
        members |= {"b_down": members["w_down"], "b_up": members["w_up"]}
        block = 4096 if call.device.type == "cpu" else 256
        elements = part_sizes(call)
        blocks = sum(
            -(-elements[name] // block) * members.get(name, 1)
            for name in PARTS
            if name in self.grads
        )
        own = ("D", "R", "DOWN_PER_SAMPLE", "UP_PER_SAMPLE")
        _kernels("bwd_columns")._gated_adapter_bwd_sum_kernel[(blocks,)](
            self.parts, self.given["down_index"], self.given["up_index"],
            *(self.grads.get(name) for name in PARTS),
            plan.shared_groups, self.shares, members["w_down"], members["w_up"],
            **self.layout, **{name: plan.constants[name] for name in own}, BLOCK=block,
        )  # fmt: skip


_ROWS_INPUTS = CONTRACT.input_names[: CONTRACT.input_names.index("gate")]
_COLUMNS_INPUTS = tuple(name for name in _ROWS_INPUTS if name not in ("b_down", "post_norm_bias"))


def _contiguous(value: Value) -> Value:
    return value if value is None else value.contiguous()


@cache
def _kernels(name: str) -> ModuleType:
    return importlib.import_module(f"{__package__}._triton_{name}")
