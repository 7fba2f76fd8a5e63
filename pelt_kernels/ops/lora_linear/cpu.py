"""lora_linear by torch's own product for the frozen weight and fused C++ kernels around it
(csrc/ops/lora_linear/fused_cpu.cpp and its backward).

float32 and bfloat16, sums in float32; float32 parameters of the branches beside bfloat16
activations are used unrounded. Every sum of the kernels has an order fixed by the shapes: results
depend neither on the run nor on the number of threads beyond what torch's product does. Where B is
zero, y is that product bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._bank import linear, weight_grad
from .._contract import Call, Value
from .._philox import threshold
from .contract import CONTRACT

_DTYPES = {torch.float32: 0, torch.bfloat16: 2}
_POOLINGS = {"token": 1, "mean": 2, "masked_mean": 3}
_SIXTY_FOUR_BITS = 0xFFFFFFFFFFFFFFFF
# The inputs whose gradients the kernels write.
_NAMES = tuple(row.name for row in CONTRACT.input_rows if row.is_list and row.kind == "parameter")


def supports(call: Call) -> str:
    """Why the kernels cannot serve a call; empty if they can."""
    native = getattr(_native.library("_C"), "LoraLinearCpu", None)
    if native is None:
        return "the compiled module is older than this kernel; build it with `make build`"
    if call.dtype not in _DTYPES:
        return f"it takes float32 or bfloat16, and x is {str(call.dtype).removeprefix('torch.')}"
    at = call.attributes
    branches, learned = len(at["offsets"]), len(at["extra_poolings"])
    learned += sum(pooling != "none" for pooling in at["poolings"])
    if branches > native.max_branches or learned > native.max_gates:
        return (
            f"it takes at most {native.max_branches} branches and {native.max_gates} learned gates,"
            f" and there are {branches} and {learned}"
        )
    return ""


def forward(
    call: Call, x: Tensor, weight: Tensor, bias: Tensor | None, seed: int, **inputs: Value
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """y [B, S, Dout], the extra gates, the branches' learned gates (or [0] each), and s [B, S, ΣR]
    for backward.
    """
    plan, threads = _plan_of(call, inputs), torch.get_num_threads()
    y = linear(x, weight.T if call.attributes["transposed"] else weight, bias)
    s = _native.empty(plan.s_shape, call.dtype, call.device)
    extras = [_native.empty(shape, torch.float32, call.device) for shape in plan.extra_shapes]
    values = [_native.empty(shape, torch.float32, call.device) for shape in plan.value_shapes]
    if plan.is_empty:
        for gate in (*extras, *values):
            gate.zero_()
        return y, extras, values, s
    if not plan.has_work:
        return y, extras, values, s
    y, x = y.contiguous(), x.contiguous()
    borrowed: list[Tensor] = []
    workspace = _native.workspace(plan.bytes(False, threads), call.device)
    plan.native.forward(
        **plan.inputs(inputs, values, extras, None, borrowed),
        x=x.data_ptr(), s=s.data_ptr(), y=y.data_ptr(), workspace=_native.pointer(workspace),
        seed=seed & _SIXTY_FOUR_BITS, threads=threads,
    )  # fmt: skip
    return y, extras, values, s


def backward(
    call: Call,
    needs: dict[str, bool],
    dy: Tensor,
    dextra_gates: list[Tensor],
    gate_values: list[Tensor],
    s: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seed: int,
    **inputs: Value,
) -> dict[str, Value]:
    """The gradients that ``needs`` names, by input name."""
    plan, threads = _plan_of(call, inputs), torch.get_num_threads()
    is_transposed = call.attributes["transposed"]
    grads: dict[str, Value] = {}
    if needs["x"]:
        grads["x"] = (dy @ (weight.T if is_transposed else weight).to(dy.dtype)).contiguous()
    if needs["weight"]:
        dweight = weight_grad(x, dy, False) if is_transposed else weight_grad(dy, x, False)
        grads["weight"] = dweight.to(weight.dtype).contiguous()
    if bias is not None and needs["bias"]:
        grads["bias"] = dy.sum(dim=(0, 1), dtype=torch.float32).to(bias.dtype)
    for name in _NAMES:
        if needs[name]:
            grads[name] = [_empty_like(value) for value in inputs[name]]
    if plan.is_empty:
        for name in _NAMES:
            for grad in grads.get(name, ()):
                if grad is not None:
                    grad.zero_()
    if plan.is_empty or not plan.has_work:
        return grads
    dy, s, x = dy.contiguous(), s.contiguous(), x.contiguous()
    borrowed: list[Tensor] = []
    workspace = _native.workspace(plan.bytes(True, threads), call.device)
    plan.native.backward(
        **plan.inputs(inputs, gate_values, [None] * len(dextra_gates), dextra_gates, borrowed),
        **plan.gradients(grads),
        x=x.data_ptr(), s=s.data_ptr(), dy=dy.data_ptr(), dx=_native.pointer(grads.get("x")),
        workspace=_native.pointer(workspace), seed=seed & _SIXTY_FOUR_BITS, threads=threads,
    )  # fmt: skip
    return grads


def _empty_like(value: Tensor | None) -> Tensor | None:
    return None if value is None else _native.empty(value.shape, value.dtype, value.device)


class _Plan:
    """What is the same for every call with these shapes: the kernels' description of it, the
    outputs' shapes, and how much memory each direction needs.
    """

    def __init__(self, call: Call, inputs: dict[str, Value]) -> None:
        at, sizes, p = call.attributes, call.sizes, call.attributes["dropout_p"]
        # The branches with a learned gate, whose numbers come before the extra gates'.
        self.gated = [i for i, pooling in enumerate(at["poolings"]) if pooling != "none"]
        poolings = [at["poolings"][i] for i in self.gated] + list(at["extra_poolings"])
        weights = [inputs["gate_weight"][i] for i in self.gated] + list(inputs["extra_weight"])
        biases = [inputs["gate_bias"][i] for i in self.gated] + list(inputs["extra_bias"])
        self.native: Any = _native.library("_C").LoraLinearCpu(
            dtype=_DTYPES[call.dtype],
            sizes=[sizes[letter] for letter in ("B", "S", "Din", "Dout")],
            branches=[self._branch(call, inputs, i) for i in range(len(at["offsets"]))],
            gates=[
                (_POOLINGS[pooling], _is_float32(w), _is_float32(c))
                for pooling, w, c in zip(poolings, weights, biases)
            ],
            threshold=threshold(p) if p else 0,
            dropout_scale=1.0 / (1.0 - p),
        )
        shapes = CONTRACT.output_shapes(call)
        self.s_shape, self.extra_shapes = shapes["s"], shapes["extra_gates"]
        self.value_shapes = shapes["gate_values"]
        self.is_empty = sizes["B"] * sizes["S"] == 0
        self.branches = len(at["offsets"])
        self.has_work = self.branches + len(poolings) > 0
        self._bytes: dict[tuple[bool, int], int] = {}

    def _branch(self, call: Call, inputs: dict[str, Value], i: int) -> tuple[Any, ...]:
        a, b, gate = inputs["a"][i], inputs["b"][i], inputs["gate"][i]
        at, a_index, b_index = call.attributes, inputs["a_index"][i], inputs["b_index"][i]
        return (
            (
                a.shape[-2], b.shape[-2], at["offsets"][i],
                a.shape[0] if a.ndim == 3 else 1, b.shape[0] if b.ndim == 3 else 1,
            ),
            at["scales"][i],
            (_ndim(a_index) == 1, _ndim(b_index) == 1, _ndim(gate) == 2),
            self.gated.index(i) if i in self.gated else -1,
            (_is_float32(a), _is_float32(b), _is_float32(gate)),
        )  # fmt: skip

    def inputs(
        self,
        inputs: dict[str, Value],
        values: list[Tensor],
        extras: list[Any],
        dextras: list[Tensor] | None,
        borrowed: list[Tensor],
    ) -> dict[str, Any]:
        """Addresses by branch and by learned gate; ``borrowed`` keeps copies alive."""

        def address(tensor: Tensor | None) -> int:
            if tensor is None:
                return 0
            if not tensor.is_contiguous():
                tensor = tensor.contiguous()
                borrowed.append(tensor)
            return tensor.data_ptr()

        names = ("a", "b", "a_index", "b_index", "gate")
        branches = [list(map(address, of)) for of in zip(*(inputs[name] for name in names))]
        gates = [
            [
                address(t)
                for t in (inputs["gate_weight"][i], inputs["gate_bias"][i], values[i], None)
            ]
            for i in self.gated
        ]
        given = zip(inputs["extra_weight"], inputs["extra_bias"], extras, dextras or extras)
        for weight, bias, value, dvalue in given:
            of = (weight, bias, value, None if dextras is None else dvalue)
            gates.append([address(tensor) for tensor in of])
        return {"branches": branches, "gates": gates, "mask": address(inputs["mask"])}

    def gradients(self, grads: dict[str, Value]) -> dict[str, Any]:
        """Addresses of the gradients; 0 where one is not wanted."""

        def address(name: str, i: int) -> int:
            return _native.pointer(grads[name][i]) if name in grads else 0

        return {
            "branch_grads": [
                [address(name, i) for name in ("a", "b", "gate")] for i in range(self.branches)
            ],
            "gate_grads": [
                *([address("gate_weight", i), address("gate_bias", i)] for i in self.gated),
                *(
                    [address("extra_weight", i), address("extra_bias", i)]
                    for i in range(len(self.extra_shapes))
                ),
            ],
        }

    def bytes(self, is_backward: bool, threads: int) -> int:
        """The size of the workspace."""
        size = self._bytes.get((is_backward, threads))
        if size is None:
            size = self._bytes[is_backward, threads] = self.native.workspace_bytes(
                is_backward=is_backward, threads=threads
            )
        return size


_plans: dict[int, tuple[Call, _Plan]] = {}


def _plan_of(call: Call, inputs: dict[str, Value]) -> _Plan:
    found = _plans.get(id(call))
    if found is None or found[0] is not call:
        if len(_plans) >= 4096:  # as many as the contract keeps calls
            _plans.clear()
        found = _plans[id(call)] = (call, _Plan(call, inputs))
    return found[1]


def _is_float32(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype == torch.float32


def _ndim(tensor: Tensor | None) -> int:
    return -1 if tensor is None else tensor.ndim
