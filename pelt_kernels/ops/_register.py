"""From a contract to torch operators: two library entries per operator and one autograd.Function around them.

``torch.ops.pelt_kernels.<name>_fwd`` and ``_bwd`` are made with `Library.define` and `impl`, the cheapest way through
torch's dispatcher (about 3 us a call where `torch.library.custom_op` costs 20). Both take the contract's inputs and
attributes, and the request for a backend as the last word; both bind and select again, so that backward runs on the
backend that ran forward, under torch.compile too.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from . import _dispatch
from ._contract import Call, Contract, Value

_LIBRARY = torch.library.Library("pelt_kernels", "DEF")
_SCHEMA_TYPE = {"float": "float", "int": "int", "bool": "bool", "str": "str"}


class Operator:
    """A registered operator: call it with the contract's inputs and attributes, in the contract's order."""

    def __init__(self, contract: Contract) -> None:
        self.contract = contract
        self.fwd = self._define(f"{contract.name}_fwd", _forward_schema(contract), self._forward, self._fake_forward)
        self.bwd = self._define(f"{contract.name}_bwd", _backward_schema(contract), self._backward, self._fake_backward)
        self.function = _make_function(self)

    def __call__(self, values: Sequence[Value], attributes: Sequence[Any], backend: str | None) -> tuple[Any, ...]:
        """The contract's public outputs, as a tuple. Builds no graph where no gradient can be asked for."""
        request = _dispatch.current_request() if backend is None else backend
        attributes = (*attributes, request)
        if torch.is_grad_enabled() and _requires_grad(values):
            lengths = tuple(len(v) if isinstance(v, (list, tuple)) else -1 for v in values)
            flat = self.function.apply(lengths, attributes, *_flatten(values))
            return _group(flat, self.contract.public_rows)
        outputs = self.fwd(*values, *attributes)
        return tuple(out for out, row in zip(outputs, self.contract.output_rows) if "private" not in row.flags)

    def _define(self, name: str, schema: str, implementation: Any, fake: Any) -> Any:
        _LIBRARY.define(f"{name}{schema}")
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"pelt_kernels::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.pelt_kernels, name).default

    def _bind(self, args: Sequence[Any]) -> tuple[Call, dict[str, Value]]:
        count = len(self.contract.input_names)
        values, attributes, request = args[:count], args[count:-1], args[-1]
        call = _dispatch.select(self.contract.bind(values, attributes), request)
        return call, dict(zip(self.contract.input_names, values))

    def _forward(self, *args: Any) -> tuple[Any, ...]:
        call, values = self._bind(args)
        implementation = _dispatch.implementation(self.contract.name, call.backend)
        with _without_autocast(call):
            return implementation.forward(call, **values)

    def _fake_forward(self, *args: Any) -> tuple[Any, ...]:
        call, _ = self._bind(args)
        shapes = self.contract.output_shapes(call)
        return tuple(_empty_output(call, row, shapes[row.name]) for row in self.contract.output_rows)

    def _split_backward(self, args: Sequence[Any]) -> tuple[dict[str, Any], Sequence[Value], list[bool], Sequence[Any]]:
        """Backward's arguments: output gradients, saved outputs, needs, then forward's inputs and attributes.

        An input whose gradient is dy itself is not kept; a [0] tensor in its place would not bind, so None is passed
        and the attributes still tell that it was there.
        """
        contract = self.contract
        grads = [f"d{row.name}" for row in contract.public_rows if row.is_differentiable]
        saved = [row.name for row in contract.saved_rows]
        named = dict(zip(grads + saved, args))
        position = len(named)
        needs = args[position]
        kept = iter(args[position + 1 : position + 1 + len(contract.backward_rows)])
        values = [None if row.grad_is_dy else next(kept) for row in contract.input_rows]
        return named, values, needs, args[position + 1 + len(contract.backward_rows) :]

    def _backward(self, *args: Any) -> list[Tensor]:
        named, values, needs, rest = self._split_backward(args)
        call, inputs = self._bind((*values, *rest))
        needed = dict(zip([row.name for row in self.contract.backward_rows], needs))
        implementation = _dispatch.implementation(self.contract.name, call.backend)
        with _without_autocast(call):
            grads = implementation.backward(call, needed, **named, **inputs)
        return _flatten_grads(self.contract, needed, inputs, grads)

    def _fake_backward(self, *args: Any) -> list[Tensor]:
        _, values, needs, _ = self._split_backward(args)
        inputs = dict(zip(self.contract.input_names, values))
        needed = dict(zip([row.name for row in self.contract.backward_rows], needs))
        like = {row.name: _map(torch.Tensor.new_empty, inputs[row.name]) for row in self.contract.backward_rows}
        return _flatten_grads(self.contract, needed, inputs, like)


def _map(make: Any, value: Value) -> Value:
    """New contiguous memory of a value's shapes; a list keeps its Nones."""
    if isinstance(value, (list, tuple)):
        return [_map(make, v) for v in value]
    return None if value is None else make(value, value.shape)


def _flatten_grads(
    contract: Contract, needed: dict[str, bool], inputs: dict[str, Value], grads: dict[str, Value]
) -> list[Tensor]:
    """The gradients that were asked for, in the contract's order, lists expanded, absent elements left out."""
    flat: list[Tensor] = []
    for row in contract.backward_rows:
        if needed[row.name]:
            value, grad = inputs[row.name], grads[row.name]
            if isinstance(value, (list, tuple)):
                flat += [g for v, g in zip(value, grad) if v is not None]
            else:
                flat.append(grad)
    return flat


def _without_autocast(call: Call) -> Any:
    """Backends choose their dtypes themselves: under autocast torch would recast what they keep in float32."""
    device = call.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _empty_output(call: Call, row: Any, shape: Any) -> Any:
    dtype = torch.float32 if row.kind == "float32" and call.dtype != torch.float64 else call.dtype
    if row.is_list:
        return [torch.empty(s, dtype=dtype, device=call.device) for s in shape]
    return torch.empty(shape, dtype=dtype, device=call.device)


def _forward_schema(contract: Contract) -> str:
    inputs = ", ".join(row.schema for row in contract.input_rows)
    outputs = ", ".join("Tensor[]" if row.is_list else "Tensor" for row in contract.output_rows)
    return f"({inputs}, {_attribute_schema(contract)}, str backend) -> ({outputs})"


def _backward_schema(contract: Contract) -> str:
    grads = [(f"d{row.name}", row) for row in contract.public_rows if row.is_differentiable]
    saved = [(row.name, row) for row in contract.saved_rows]
    outputs = ", ".join(f"Tensor{'[]' if row.is_list else ''} {name}" for name, row in grads + saved)
    inputs = ", ".join(row.schema for row in contract.backward_rows)
    return f"({outputs}, bool[] needs, {inputs}, {_attribute_schema(contract)}, str backend) -> Tensor[]"


def _attribute_schema(contract: Contract) -> str:
    return ", ".join(f"{row.type} {row.name}" for row in contract.attribute_rows)


def _flatten(values: Sequence[Value]) -> list[Tensor | None]:
    flat: list[Tensor | None] = []
    for value in values:
        if isinstance(value, (list, tuple)):
            flat.extend(value)
        else:
            flat.append(value)
    return flat


def _unflatten(flat: Sequence[Any], lengths: Sequence[int]) -> list[Value]:
    values: list[Value] = []
    position = 0
    for length in lengths:
        if length < 0:
            values.append(flat[position])
            position += 1
        else:
            values.append(list(flat[position : position + length]))
            position += length
    return values


def _group(flat: Sequence[Tensor], rows: Sequence[Any]) -> tuple[Any, ...]:
    """Public outputs from the flat ones; only the last may be a list, so its length is what is left."""
    grouped: list[Any] = []
    for i, row in enumerate(rows):
        grouped.append(list(flat[i:]) if row.is_list else flat[i])
    return tuple(grouped)


def _requires_grad(values: Sequence[Value]) -> bool:
    for value in values:
        if isinstance(value, (list, tuple)):
            if _requires_grad(value):
                return True
        elif isinstance(value, Tensor) and value.requires_grad:
            return True
    return False


def _filled(pair: Any) -> Any:
    """An output's gradient; zeros for an output that the loss does not depend on."""
    if isinstance(pair, list):
        return [_filled(p) for p in pair]
    grad, (shape, dtype, device) = pair
    return torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad.contiguous()


def _make_function(operator: Operator) -> Any:
    """The autograd.Function of an operator. It only moves arguments; the numbers are made behind the two ops."""
    contract, fwd, bwd = operator.contract, operator.fwd, operator.bwd
    output_rows, input_rows = contract.output_rows, contract.input_rows

    def forward(ctx: Any, lengths: tuple[int, ...], attributes: tuple[Any, ...], *flat: Any) -> tuple[Tensor, ...]:
        values = _unflatten(flat, lengths)
        outputs = fwd(*values, *attributes)
        named = {row.name: out for row, out in zip(output_rows, outputs)}
        kept = [v for row, v in zip(input_rows, values) if not row.grad_is_dy]
        kept_lengths = tuple(n for row, n in zip(input_rows, lengths) if not row.grad_is_dy)
        saved = [named[row.name] for row in contract.saved_rows]
        ctx.save_for_backward(*_flatten(kept), *_flatten(saved))
        ctx.lengths, ctx.kept_lengths, ctx.attributes = lengths, kept_lengths, attributes
        ctx.saved_lengths = tuple(len(v) if isinstance(v, (list, tuple)) else -1 for v in saved)
        ctx.set_materialize_grads(False)
        public = [named[row.name] for row in contract.public_rows]
        ctx.output_lengths = tuple(len(v) if isinstance(v, (list, tuple)) else -1 for v in public)
        frozen = [out for row, out in zip(contract.public_rows, public) if not row.is_differentiable]
        ctx.mark_non_differentiable(*_flatten(frozen))
        ctx.empty_like = [(t.shape, t.dtype, t.device) for t in _flatten(public)]
        return tuple(_flatten(public))

    def backward(ctx: Any, *flat_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        kept_count = sum(1 if n < 0 else n for n in ctx.kept_lengths)
        kept = _unflatten(tensors[:kept_count], ctx.kept_lengths)
        saved = _unflatten(tensors[kept_count:], ctx.saved_lengths)
        grouped = _unflatten(list(zip(flat_grads, ctx.empty_like)), ctx.output_lengths)
        grads = [_filled(g) for row, g in zip(contract.public_rows, grouped) if row.is_differentiable]
        needs_flat = list(ctx.needs_input_grad[2:])
        needs = [any(n) if isinstance(n, list) else n for n in _unflatten(needs_flat, ctx.lengths)]
        asked = [n for row, n in zip(input_rows, needs) if not row.grad_is_dy]
        fresh = iter(bwd(*grads, *saved, asked, *kept, *ctx.attributes)) if any(asked) else iter(())
        kept_values = iter(kept)
        result: list[Tensor | None] = [None, None]
        for row, need, length in zip(input_rows, needs, ctx.lengths):
            if row.grad_is_dy:
                result.append(grads[0] if need else None)
                continue
            value = next(kept_values)
            elements = [value] if length < 0 else value
            result += [next(fresh) if need and element is not None else None for element in elements]
        return tuple(result)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"{contract.name}_function", (torch.autograd.Function,), members)
