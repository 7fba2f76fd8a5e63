"""What the two backends with compiled kernels have in common: torch's own product of the frozen
weight, and a description of the rest for the C++ side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._bank import linear, weight_grad
from .._contract import Call, Value
from .._philox import threshold
from .contract import CONTRACT

SIXTY_FOUR_BITS = 0xFFFFFFFFFFFFFFFF
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_POOLINGS = {"token": 1, "mean": 2, "masked_mean": 3}
# The inputs whose gradients the kernels write.
_NAMES = tuple(row.name for row in CONTRACT.input_rows if row.is_list and row.kind == "parameter")


def number_of(dtype: torch.dtype) -> int:
    """A dtype as the C++ side counts them."""
    return _DTYPES[dtype]


def count_gates(call: Call) -> int:
    """The learned gates of a call, the extra ones included."""
    at = call.attributes
    return len(at["extra_poolings"]) + sum(pooling != "none" for pooling in at["poolings"])


def pooling_numbers(call: Call) -> list[int]:
    """The learned gates' poolings as the C++ side counts them: those of branches, then the extra
    ones.
    """
    at = call.attributes
    of_branches = [pooling for pooling in at["poolings"] if pooling != "none"]
    return [_POOLINGS[pooling] for pooling in [*of_branches, *at["extra_poolings"]]]


def base_product(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b, contiguous, for the kernels to add to."""
    return linear(x, weight.T if call.attributes["transposed"] else weight, bias).contiguous()


def base_grads(
    call: Call,
    needs: dict[str, bool],
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    product_dtype: torch.dtype,
) -> dict[str, Value]:
    """The gradients of the base product: dx for the kernels to add to, and the weight's and the
    bias's where they are not frozen. Products are computed in ``product_dtype``.
    """
    grads: dict[str, Value] = {}
    is_transposed = call.attributes["transposed"]
    wide = dy.to(product_dtype)
    if needs["x"]:
        base = (weight.T if is_transposed else weight).to(product_dtype)
        grads["x"] = (wide @ base).to(dy.dtype).contiguous()
    if needs["weight"]:
        dy, x = wide, x.to(product_dtype)
        dweight = weight_grad(x, dy, False) if is_transposed else weight_grad(dy, x, False)
        grads["weight"] = dweight.to(weight.dtype).contiguous()
    if bias is not None and needs["bias"]:
        grads["bias"] = dy.sum(dim=(0, 1), dtype=torch.float32).to(bias.dtype)
    return grads


class Plan:
    """What is the same for every call with these shapes: the kernels' description of it, made by
    ``native_class`` from it and from ``more``, and the outputs' shapes.
    """

    def __init__(
        self, call: Call, inputs: dict[str, Value], native_class: Any, more: dict[str, Any]
    ) -> None:
        at, sizes, p = call.attributes, call.sizes, call.attributes["dropout_p"]
        # The branches with a learned gate, whose numbers come before the extra gates'.
        self.gated = [i for i, pooling in enumerate(at["poolings"]) if pooling != "none"]
        poolings = [at["poolings"][i] for i in self.gated] + list(at["extra_poolings"])
        weights = [inputs["gate_weight"][i] for i in self.gated] + list(inputs["extra_weight"])
        biases = [inputs["gate_bias"][i] for i in self.gated] + list(inputs["extra_bias"])
        self.native: Any = native_class(
            dtype=_DTYPES[call.dtype],
            sizes=[sizes[letter] for letter in ("B", "S", "Din", "Dout")],
            branches=[self._branch(call, inputs, i) for i in range(len(at["offsets"]))],
            gates=[
                (_POOLINGS[pooling], _is_float32(w), _is_float32(c))
                for pooling, w, c in zip(poolings, weights, biases)
            ],
            threshold=threshold(p) if p else 0,
            dropout_scale=1.0 / (1.0 - p),
            **more,
        )
        shapes = CONTRACT.output_shapes(call)
        self.s_shape, self.extra_shapes = shapes["s"], shapes["extra_gates"]
        self.value_shapes = shapes["gate_values"]
        self.is_empty = sizes["B"] * sizes["S"] == 0
        self.branches = len(at["offsets"])
        self.bytes: dict[Any, int] = {}  # workspaces' sizes, as the backend tells them apart
        self.has_work = self.branches + len(poolings) > 0

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

    def addresses(
        self,
        inputs: dict[str, Value],
        values: list[Tensor],
        extras: list[Any],
        dextras: list[Any],
        dense: Callable[[Tensor], Tensor],
        borrowed: list[Tensor],
    ) -> dict[str, Any]:
        """Addresses by branch, and by learned gate (those of branches first). ``dense`` makes a
        tensor readable for the kernels; ``borrowed`` keeps copies alive.
        """

        def address(tensor: Tensor | None) -> int:
            if tensor is None:
                return 0
            readable = dense(tensor)
            if readable is not tensor:
                borrowed.append(readable)
            return readable.data_ptr()

        names = ("a", "b", "a_index", "b_index", "gate")
        branches = [list(map(address, of)) for of in zip(*(inputs[name] for name in names))]
        gates = [
            (inputs["gate_weight"][i], inputs["gate_bias"][i], values[i], None) for i in self.gated
        ]
        gates += zip(inputs["extra_weight"], inputs["extra_bias"], extras, dextras)
        return {
            "branches": branches,
            "gates": [list(map(address, of)) for of in gates],
            "mask": address(inputs["mask"]),
        }

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

    def outputs(self, call: Call) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """The extra gates, the branches' learned gates (or [0] each), and s, to be filled."""

        def gates(shapes: list[tuple[int, ...]]) -> list[Tensor]:
            out = [_native.empty(shape, torch.float32, call.device) for shape in shapes]
            return [gate.zero_() for gate in out] if self.is_empty else out

        s = _native.empty(self.s_shape, call.dtype, call.device)
        return gates(self.extra_shapes), gates(self.value_shapes), s

    def empty_grads(self, needs: dict[str, bool], inputs: dict[str, Value]) -> dict[str, Value]:
        """The gradients that the kernels write, to be filled; zeros where there are no rows."""
        grads: dict[str, Value] = {}
        for name in _NAMES:
            if not needs[name]:
                continue
            like = [None if t is None else (t.shape, t.dtype, t.device) for t in inputs[name]]
            grads[name] = [None if of is None else _native.empty(*of) for of in like]
            for grad in grads[name] if self.is_empty else ():
                if grad is not None:
                    grad.zero_()
        return grads


_plans: dict[int, tuple[Call, Plan]] = {}


def plan_of(call: Call, inputs: dict[str, Value], native_class: Any, **more: Any) -> Plan:
    """The call's plan, made once."""
    found = _plans.get(id(call))
    if found is None or found[0] is not call:
        if len(_plans) >= 4096:  # as many as the contract keeps calls
            _plans.clear()
        found = _plans[id(call)] = (call, Plan(call, inputs, native_class, more))
    return found[1]


def _is_float32(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.dtype == torch.float32


def _ndim(tensor: Tensor | None) -> int:
    return -1 if tensor is None else tensor.ndim
