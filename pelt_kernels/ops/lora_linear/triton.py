"""lora_linear by PyTorch's matrix product for the frozen weight and Triton kernels for all else.

See _triton_fwd.py and _triton_bwd.py for the schedules, _triton_plan.py for the tiles. Tensors that
are not contiguous are copied first. Gradients are summed in a fixed order: two runs give the same
bits. Triton is imported when the first call is served, never before. On CPU tensors the kernels run
in Triton's interpreter, which is for tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _native
from .._bank import linear
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
from ._base import base_grads
from ._triton_plan import CANDIDATES, MAX_WIDTH, Layout, Plan
from .contract import CONTRACT

__all__ = ["CANDIDATES", "backward", "forward", "plan", "supports", "tune", "unavailable"]


def supports(signature: Signature, backend: str, form: str, needs_grad: bool = True) -> str:
    """Why the kernels cannot serve a call; empty if they can."""
    width = sum(signature.sizes.get("R_i", ()))
    ranks = f"its registers hold ranks that add up to at most {MAX_WIDTH}, and they are {width}"
    gates = len(signature.attributes["extra_poolings"]) + sum(
        n == "gate_weight" for n, _ in signature.flat_names
    )
    many = f"it evaluates at most 16 learned gates in one read of x, and there are {gates}"
    rows = "it counts rows in 32 bits, and there are 2**31 or more"
    is_long = signature.sizes["B"] * signature.sizes["S"] >= 2**31
    return why_not(signature, (width > MAX_WIDTH, ranks), (gates > 16, many), (is_long, rows))


plan = Plan


def forward(
    chosen: Chosen, seed: int, **inputs: Value
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """y [B, S, Dout], the extra gates, the branches' learned gates (or [0] each), and s [B, S, ΣR]
    for backward.
    """
    shapes = CONTRACT.output_shapes(chosen)
    extras = [_native.empty(n, torch.float32, chosen.device) for n in shapes["extra_gates"]]
    values = [_native.empty(n, torch.float32, chosen.device) for n in shapes["gate_values"]]
    s = _native.empty(shapes["s"], chosen.dtype, chosen.device)
    inputs = within_bounds(chosen, inputs)
    x = inputs["x"].contiguous()
    with _native.on(chosen.device):
        base = inputs["weight"].T if chosen.attributes["transposed"] else inputs["weight"]
        y = linear(x, base, inputs["bias"]).contiguous()
        if y.shape[0] * y.shape[1] == 0:
            return y, [g.zero_() for g in extras], [g.zero_() for g in values], s
        plan = chosen.plan
        given = _given(inputs)
        gates = [values[g.branch] if g.extra < 0 else extras[g.extra] for g in plan.learned]
        if plan.branches or gates:
            own = tuple(g if learned.is_token else None for g, learned in zip(gates, plan.learned))
            row_gates = _shrink(plan, x, given, s, own, seed)
            if not all(learned.is_token for learned in plan.learned):
                _pool(plan, given, row_gates, gates)
        if plan.branches:
            _expand(plan, given, s, values, y)
    return y, extras, values, s


def backward(
    chosen: Chosen,
    needs: dict[str, bool],
    dy: Tensor,
    dextra_gates: list[Tensor],
    gate_values: list[Tensor],
    s: Tensor,
    seed: int,
    **inputs: Value,
) -> dict[str, Value]:
    """The gradients that ``needs`` names, by input name."""
    inputs = within_bounds(chosen, inputs)
    with _native.on(chosen.device):
        grads = base_grads(chosen, needs, dy, inputs, dy.dtype)
        if dy.shape[0] * dy.shape[1] == 0:
            for name in set(needs) - set(grads):
                if needs[name]:
                    grads[name] = [_zeros(value) for value in inputs[name]]
        else:
            plan = chosen.plan
            _Backward(
                plan, needs, grads, dy.contiguous(), dextra_gates, gate_values, s, seed, inputs
            ).run()
    return {name: grads[name] for name, need in needs.items() if need}


def _shrink(
    plan: Plan, x: Tensor, given: dict[str, Value], s: Tensor | None, own: Value, seed: int
) -> Tensor:
    """Fills s, and the rows' learned gates: those in ``own`` that are there, the others in the
    tensor [gates, T] that is returned. Without s only gates.
    """
    row_gates = _native.empty((len(own), plan.rows_total), torch.float32, x.device)
    a, a_index = ((), ()) if s is None else (given["a"], given["a_index"])

    def launch(config: Config) -> None:
        tiles = plan.tiles(config)
        _kernels("fwd")._lora_linear_shrink_kernel[(plan.groups * tiles,)](
            x, a, a_index, *_learned(given), s, own, row_gates,
            plan.rows, tiles, plan.rows_total, *signed(seed), *plan.dropout,
            **plan.shrink(config, s is not None),
        )  # fmt: skip

    launch_fitting(plan.configs, "shrink", launch)
    return row_gates


def _pool(plan: Plan, given: dict[str, Value], row_gates: Tensor, gates: list[Tensor]) -> None:
    """The values of pooled gates, from their rows'."""
    b, s = plan.signature.sizes["B"], plan.signature.sizes["S"]
    _kernels("fwd")._lora_linear_pool_kernel[(b * len(gates),)](
        row_gates, given["mask"],
        tuple(None if learned.is_token else g for g, learned in zip(gates, plan.learned)), b, s,
        IS_MASKED=plan.is_masked, BLOCK=POOL_BLOCK,
    )  # fmt: skip


def _expand(
    plan: Plan, given: dict[str, Value], s: Tensor, values: list[Tensor], y: Tensor
) -> None:
    """Adds the branches to y."""

    def launch(config: Config) -> None:
        tiles, outer = plan.tiles(config), plan.outer(config)
        _kernels("fwd")._lora_linear_expand_kernel[(outer["CHUNKS"] * plan.groups * tiles,)](
            y, s, given["b"], given["b_index"], _factors(given, values), plan.scales,
            plan.rows, plan.signature.sizes["S"], tiles, **outer, B_PER_SAMPLE=plan.b_per_sample,
            IS_APART=plan.is_apart,
        )  # fmt: skip

    launch_fitting(plan.configs, "expand", launch)


class _Backward:
    """One backward: its tensors, and its launches in order."""

    def __init__(
        self,
        plan: Plan,
        needs: dict[str, bool],
        grads: dict[str, Value],
        dy: Tensor,
        dextra_gates: list[Tensor],
        gate_values: list[Tensor],
        s: Tensor,
        seed: int,
        inputs: dict[str, Value],
    ) -> None:
        self.plan, self.needs, self.grads, self.seed = plan, needs, grads, seed
        self.dy, self.s, self.dextra_gates = dy, s.contiguous(), dextra_gates
        self.x, self.given = inputs["x"].contiguous(), _given(inputs)
        self.factors = _factors(self.given, gate_values)
        self.wanted = tuple(needs.values())
        self.layout: Layout = plan.once(self.wanted, lambda: Layout(plan, needs))
        for name in SUMMED:
            if needs[name]:
                grads[name] = _native.empty_like(inputs[name])
        self.gate_grads = grads.get("gate") or [None] * plan.branches
        self.row_gates: Tensor | None = None
        self.dots: Tensor | None = None
        self.ds: Tensor | None = None
        self.parts: dict[bool, Tensor | None] = {False: None, True: None}
        self.share_counts = {False: 1, True: 1}

    def run(self) -> None:
        plan, needs = self.plan, self.needs
        has_given = any(grad is not None for grad in self.gate_grads)
        wants_learned = bool(plan.learned) and self.layout.has_inner
        if plan.branches and (needs["a"] or needs["x"] or has_given or wants_learned):
            launch_fitting(plan.configs, "rows", self._rows)
        if wants_learned:
            none = (None,) * len(plan.learned)
            self.row_gates = _shrink(plan, self.x, self.given, None, none, self.seed)
        if wants_learned or has_given:
            self._pool(wants_learned)
        if self.layout.has_inner and (plan.branches or plan.learned):
            launch_fitting(plan.configs, "columns_in", self._columns_in)
        if self.layout.sizes[True]:
            launch_fitting(plan.configs, "columns_out", self._columns_out)
        if self.layout.parts:
            self._sum()

    def _rows(self, config: Config) -> None:
        plan, given, tiles = self.plan, self.given, self.plan.tiles(config)
        self.ds = _native.empty(self.s.shape, self.s.dtype, self.s.device)
        if any(factor is not None for factor in self.factors):
            shape = (plan.branches, plan.rows_total)
            self.dots = _native.empty(shape, torch.float32, self.s.device)
        by_row = tuple(
            grad if is_per_row else None
            for grad, is_per_row in zip(self.gate_grads, plan.gate_per_row)
        )
        _kernels("bwd")._lora_linear_bwd_rows_kernel[(plan.groups * tiles,)](
            self.dy, self.s, given["b"], given["b_index"], self.factors, plan.scales,
            self.ds, self.dots, by_row,
            plan.rows, plan.signature.sizes["S"], tiles, plan.rows_total, **plan.outer(config),
            B_PER_SAMPLE=plan.b_per_sample, IS_APART=plan.is_apart,
        )  # fmt: skip

    def _pool(self, wants_learned: bool) -> None:
        """From the rows' sums to given gates' gradients and to the learned gates' dlogit."""
        b, s = self.plan.signature.sizes["B"], self.plan.signature.sizes["S"]
        dgates: list[Tensor | None] = []
        dvalues: list[Tensor | None] = []
        dots, places, poolings = [], [], []
        for j, gate in enumerate(self.plan.learned if wants_learned else ()):
            dgates.append(None)
            dvalues.append(None if gate.extra < 0 else self.dextra_gates[gate.extra].contiguous())
            dots.append(gate.branch)
            places.append(j)
            poolings.append(gate.pooling)
        for i, grad in enumerate(self.gate_grads):
            if grad is not None and not self.plan.gate_per_row[i]:
                dgates.append(grad)
                dvalues.append(None)
                dots.append(i)
                places.append(-1)
                poolings.append("mean")
        if not dots:
            return
        _kernels("bwd")._lora_linear_bwd_pool_kernel[(b * len(dots),)](
            self.dots, tuple(dvalues), tuple(dgates), self.row_gates, self.given["mask"], b, s,
            DOTS=tuple(dots), LEARNED=tuple(places),
            IS_TOKEN=tuple(pooling == "token" for pooling in poolings),
            IS_MASKED=tuple(pooling == "masked_mean" for pooling in poolings),
            BLOCK=POOL_BLOCK,
        )  # fmt: skip

    def _part(self, is_out: bool, shares: int) -> Tensor | None:
        """Memory for the parts of one kernel; None where it sums nothing."""
        self.share_counts[is_out] = shares
        size = self.layout.sizes[is_out]
        shape = (self.plan.groups * shares, size)
        self.parts[is_out] = _native.empty(shape, torch.float32, self.s.device) if size else None
        return self.parts[is_out]

    def _columns_in(self, config: Config) -> None:
        plan, given = self.plan, self.given
        chunks = -(-plan.signature.sizes["Din"] // config.block_d)
        shares, rows_per_share = plan.shares(config, chunks)
        weights, _ = _learned(given)
        constants = plan.once((self.wanted, config), lambda: self.layout.inner(plan, config))
        _kernels("bwd")._lora_linear_bwd_columns_in_kernel[(chunks * plan.groups * shares,)](
            self.x, given["a"], given["a_index"], weights, self.ds, self.row_gates,
            given["mask"], self.grads.get("x"), self._part(False, shares),
            plan.rows, shares, plan.rows_total, rows_per_share, *signed(self.seed), *plan.dropout,
            **constants, IS_MASKED=plan.is_masked,
        )  # fmt: skip

    def _columns_out(self, config: Config) -> None:
        plan, outer = self.plan, self.plan.outer(config)
        shares, rows_per_share = plan.shares(config, outer["CHUNKS"])
        programs = outer["CHUNKS"] * plan.groups * shares
        _kernels("bwd")._lora_linear_bwd_columns_out_kernel[(programs,)](
            self.dy, self.s, self.factors, plan.scales, self._part(True, shares),
            plan.rows, plan.signature.sizes["S"], shares, rows_per_share, **outer,
            PART_SIZE=self.layout.sizes[True], B_AT=self.layout.b,
        )  # fmt: skip

    def _sum(self) -> None:
        layout = self.layout
        outs = tuple(self.grads[part.name][part.place] for part in layout.parts)
        indices = tuple(
            self.given[f"{part.name}_index"][part.place] if part.name in ("a", "b") else None
            for part in layout.parts
        )
        _kernels("bwd")._lora_linear_bwd_sum_kernel[(layout.sum_blocks,)](
            self.parts[False], self.parts[True], outs, indices,
            self.plan.groups, self.share_counts[False], self.share_counts[True], **layout.sum,
        )  # fmt: skip


POOL_BLOCK = 256  # rows of a sentence at a time: one number, so that no length compiles again
SUMMED = ("a", "b", "gate", "gate_weight", "gate_bias", "extra_weight", "extra_bias")
SMALL = (*SUMMED, "a_index", "b_index", "mask")
_kernels = kernels_of(__package__)


def _given(inputs: dict[str, Value]) -> dict[str, Value]:
    """The small inputs as kernels take them: contiguous, and a list as a tuple."""
    return {name: dense(inputs[name]) for name in SMALL}


def _learned(given: dict[str, Value]) -> tuple[Value, Value]:
    """The weights and the biases of the learned gates, in the plan's order."""
    weights = [w for w in given["gate_weight"] if w is not None]
    biases = [c for c in given["gate_bias"] if c is not None]
    return (*weights, *given["extra_weight"]), (*biases, *given["extra_bias"])


def _factors(given: dict[str, Value], values: list[Tensor]) -> tuple[Tensor | None, ...]:
    """For each branch the tensor that holds its gate, given or learned."""
    learned = given["gate_weight"]
    return tuple(
        gate if weight is None else value
        for gate, weight, value in zip(given["gate"], learned, values)
    )


def _zeros(value: Value) -> Value:
    return None if value is None else torch.zeros_like(value)
