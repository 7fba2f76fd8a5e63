"""gated_adapter by Triton kernels, for GPUs that the hand-written ones do not serve.

See _triton_fwd.py and _triton_bwd_rows.py for the schedules, _triton_plan.py for the tiles. Tensors
that are not contiguous are copied first. Gradients are summed in a fixed order: two runs give the
same bits. Triton is imported when the first call is served, never before. On CPU tensors the
kernels run in Triton's interpreter, which is for tests: it needs TRITON_INTERPRET=1 before Triton
is first imported.
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
    options_of,
    shares_of,
    signed,
    tune,
    unavailable,
    why_not,
    within_bounds,
)
from ._triton_plan import CANDIDATES, PARTS, Plan, layout_of
from .contract import CONTRACT

__all__ = ["CANDIDATES", "backward", "forward", "plan", "supports", "tune", "unavailable"]

_RESIDUAL, _GATE_WEIGHT, _GATE_BIAS = (
    CONTRACT.input_names.index(name) for name in ("residual", "gate_weight", "gate_bias")
)


def supports(signature: Signature, backend: str, form: str, needs_grad: bool = True) -> str:
    """Why the kernels cannot serve a call; empty if they can."""
    b, s, d, r = (signature.sizes[letter] for letter in "BSDR")
    rows = "it counts rows in 32 bits, and there are 2**31 or more"
    weight = "it counts the numbers of a weight in 32 bits, and D x R are 2**31 or more"
    return why_not(signature, (b * s >= 2**31, rows), (d * r >= 2**31, weight))


plan = Plan


def forward(chosen: Chosen, seed: int, **inputs: Value) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, S, D], the learned gate's value (or [0]), and h [B, S, R] for backward."""
    shapes = CONTRACT.output_shapes(chosen)
    y = _native.empty(shapes["y"], chosen.dtype, chosen.device)
    gate_value = _native.empty(shapes["gate_value"], torch.float32, chosen.device)
    h = _native.empty(shapes["h"], chosen.dtype, chosen.device)
    if y.numel() == 0:
        return y, gate_value.zero_(), h
    plan = chosen.plan
    inputs = within_bounds(chosen, inputs)
    given = [dense(inputs[name]) for name in CONTRACT.input_names]
    if chosen.attributes["residual_from"] == "input":
        given[_RESIDUAL] = given[0]
    ungated = given.copy()  # for a launch that finds the rows' gates in memory
    ungated[_GATE_WEIGHT] = ungated[_GATE_BIAS] = None
    row_gate = gate_value
    if plan.is_pooled:
        row_gate = _native.empty(shapes["y"][:2], torch.float32, chosen.device)
    kernel = _kernels("fwd")._gated_adapter_fwd_kernel
    with _native.on(chosen.device):
        for part, reads_gates in plan.parts:
            tensors = (*(ungated if reads_gates else given), y, gate_value, h, row_gate)
            more = {
                "POOLING": chosen.attributes["pooling"],
                "GATE_PER_ROW": plan.has_gate_per_row,
                "PART": part,
                "READS_GATES": reads_gates,
                "HAS_SKIP": plan.has_skip and part != "gates",
                **plan.constants,
            }

            def launch(config: Config, tensors: Any = tensors, more: Any = more) -> None:
                tiles = -(-plan.rows // config.block_t)
                kernel[(plan.groups * tiles,)](
                    *tensors, plan.rows, chosen.sizes["S"], tiles, *plan.numbers,
                    *signed(seed), *plan.dropout, **more, **options_of(config),
                )  # fmt: skip

            plan.launch("forward", launch)
    return y, gate_value, h


def backward(
    chosen: Chosen,
    needs: dict[str, bool],
    dy: Tensor,
    gate_value: Tensor,
    h: Tensor,
    seed: int,
    **inputs: Value,
) -> dict[str, Value]:
    """The gradients that ``needs`` names, by input name."""
    inputs = within_bounds(chosen, inputs)
    grads = {name: _native.empty_like(inputs[name]) for name, need in needs.items() if need}
    if dy.numel() == 0:
        return {name: grad.zero_() for name, grad in grads.items()}
    with _native.on(chosen.device):
        _Backward(chosen, inputs, grads, dy.contiguous(), gate_value, h.contiguous(), seed).run()
    return grads


class _Backward:
    """One backward: its tensors, and its launches in order."""

    def __init__(
        self,
        chosen: Chosen,
        inputs: dict[str, Value],
        grads: dict[str, Value],
        dy: Tensor,
        gate_value: Tensor,
        h: Tensor,
        seed: int,
    ) -> None:
        self.chosen, self.plan, self.grads = chosen, chosen.plan, grads
        self.given = {name: dense(inputs[name]) for name in CONTRACT.input_names}
        self.gate = gate_value if self.plan.is_learned else self.given["gate"]
        self.dy, self.h = dy, h
        self.dropout = (*signed(seed), *self.plan.dropout)
        rows = chosen.sizes["B"] * chosen.sizes["S"]
        self.dh = _native.empty(h.shape, chosen.dtype, chosen.device)
        fields = _kernels("bwd_rows").FIELDS
        self.fields = _native.empty((fields, rows), torch.float32, chosen.device)
        self.pool = None
        if self.plan.is_pooled:
            self.pool = _native.empty((chosen.sizes["B"],), torch.float32, chosen.device)

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
        plan, given, sizes = self.plan, self.given, self.chosen.sizes
        tiles = -(-plan.shared_rows // config.block_t)
        dgate = self.grads.get("gate") if plan.has_gate_per_row else None
        _kernels("bwd_rows")._gated_adapter_bwd_rows_kernel[(plan.shared_groups * tiles,)](
            *(given[name] for name in _ROWS_INPUTS), self.gate,
            given["gate_weight"], given["gate_bias"], given["mask"],
            self.dy, self.h, self.dh, self.fields, dgate,
            plan.shared_rows, sizes["S"], tiles, *plan.numbers, self.fields.shape[1],
            *self.dropout, POOLING=self.chosen.attributes["pooling"],
            GATE_PER_ROW=plan.has_value_per_row, HAS_SKIP=plan.has_skip,
            **plan.constants, **options_of(config),
        )  # fmt: skip

    def _pool(self) -> None:
        sizes, at = self.chosen.sizes, self.chosen.attributes
        dgate = None if self.plan.is_learned else self.grads["gate"]
        _kernels("bwd_rows")._gated_adapter_bwd_pool_kernel[(sizes["B"],)](
            self.fields, self.given["mask"], self.given["scale"], dgate, self.pool,
            sizes["S"], at["scale_value"], POOLING=at["pooling"],
            BLOCK=256,
        )  # fmt: skip

    def _columns(self, config: Config) -> None:
        plan, given, chosen = self.plan, self.given, self.chosen
        chunks = -(-chosen.sizes["D"] // config.block_d)
        programs = chunks * plan.rank_blocks  # for a part
        self.shares, rows_per_share = shares_of(
            plan.shared_rows, config, programs * plan.shared_groups, 2, chosen.device
        )
        wanted = tuple(self.grads)
        if wanted not in plan.layouts:
            plan.layouts[wanted] = layout_of(plan.part_sizes, self.grads)
        self.layout = plan.layouts[wanted]
        part_count = plan.shared_groups * self.shares
        self.parts = _native.empty(
            (part_count, self.layout["PART_SIZE"]), torch.float32, chosen.device
        )
        at = chosen.attributes
        _kernels("bwd_columns")._gated_adapter_bwd_columns_kernel[(programs * part_count,)](
            *(given[name] for name in _COLUMNS_INPUTS), self.gate, given["gate_weight"],
            self.dy, self.h, self.dh, self.fields, self.pool, self.grads.get("x"), self.parts,
            plan.shared_rows, chosen.sizes["S"], self.shares, at["scale_value"], at["skip_below"],
            self.fields.shape[1], rows_per_share, *self.dropout, RESIDUAL=at["residual_from"],
            GATE_PER_ROW=plan.has_value_per_row, HAS_SKIP=plan.has_skip,
            **self.layout, **plan.constants, **options_of(config),
        )  # fmt: skip

    def _sum(self) -> None:
        plan, sizes = self.plan, self.chosen.sizes
        down = (self.given["down_index"], sizes.get("M", 1), plan.constants["DOWN_PER_SAMPLE"])
        up = (self.given["up_index"], sizes.get("M_up", 1), plan.constants["UP_PER_SAMPLE"])
        banks = {"w_down": down, "b_down": down, "w_up": up, "b_up": up}
        for norm, bank in (("pre_norm", down), ("post_norm", up)):
            if norm in plan.norm_banks:
                banks |= {f"{norm}_weight": bank, f"{norm}_bias": bank}
        names = [name for name in PARTS if name in self.grads]
        indices, members, per_sample = zip(*(banks.get(name, (None, 1, False)) for name in names))
        block = 4096 if self.chosen.device.type == "cpu" else 256
        elements = tuple(plan.part_sizes[name] for name in names)
        blocks = sum(-(-size // block) * count for size, count in zip(elements, members))
        _kernels("bwd_columns")._gated_adapter_bwd_sum_kernel[(blocks,)](
            self.parts, None, tuple(self.grads[name] for name in names), indices,
            plan.shared_groups, self.shares, 1, IS_OUT=(False,) * len(names),
            AT=tuple(self.layout[PARTS[name]] for name in names), SIZE=elements,
            MEMBERS=members, IS_PER_SAMPLE=per_sample,
            SIZE_IN=self.layout["PART_SIZE"], SIZE_OUT=0, BLOCK=block,
        )  # fmt: skip


_ROWS_INPUTS = CONTRACT.input_names[: CONTRACT.input_names.index("gate")]
_COLUMNS_INPUTS = tuple(name for name in _ROWS_INPUTS if name not in ("b_down", "post_norm_bias"))
_kernels = kernels_of(__package__)
