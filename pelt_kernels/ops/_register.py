"""Registers a contract with torch as two library operators with an autograd formula, and chooses
the way that a call takes.

``torch.ops.pelt_kernels.<name>_fwd`` and ``_bwd`` take the contract's inputs and attributes, the
seed, and the request for a backend. They carry a fake implementation and an autograd formula, so
`torch.compile`, `opcheck` and `torch.export` see ordinary operators. The seed is a tensor there, so
that a graph draws one at each run and reads no number out of a tensor. ``<name>`` itself is made of
them, for whoever calls by name (`_entry`).

Plain tensors outside of any mode or transform take `_short_way`. What needs more than an output and
its gradient is served by `_formula`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, compress
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _dispatch, _formula, _short_way
from ._contract import Chosen, Contract, Signature, output_dtype
from ._entry import entry, entry_schema
from ._rows import Input, check_count
from ._short_way import filled, like_of, run_backward, run_forward
from ._values import Value, flatten, lengths_of, unflatten

_c = torch._C
_LIBRARY = torch.library.Library("pelt_kernels", "DEF")


class Operator:
    """A registered operator: call it with the contract's inputs and attributes, in the contract's
    order.
    """

    def __init__(self, contract: Contract, reference: Callable[..., Any]) -> None:
        self.contract = contract
        contract.reference = reference
        self.fwd = self._define(
            f"{contract.name}_fwd", forward_schema(contract), self._forward, self._fake_forward
        )
        self.bwd = self._define(
            f"{contract.name}_bwd", backward_schema(contract), self._backward, self._fake_backward
        )
        torch.library.register_autograd(
            f"pelt_kernels::{contract.name}_fwd",
            self._differentiate,
            setup_context=self._keep,
            lib=_LIBRARY,
        )
        _LIBRARY.define(f"{contract.name}{entry_schema(contract)}")
        _LIBRARY.impl(contract.name, entry(contract, self), "CompositeImplicitAutograd")

    def __call__(
        self, values: Sequence[Value], attributes: Sequence[Any], seed: Any, backend: str | None
    ) -> tuple[Any, ...]:
        """The contract's public outputs, as a tuple. Builds no graph where no gradient can be asked
        for.
        """
        contract = self.contract
        is_compiling = torch.compiler.is_compiling()
        request = _dispatch.request_of(contract.name, backend, is_compiling)
        if is_compiling or _is_watched():
            why = _formula.reason(values)
            if why:
                return _formula.forward(contract, values, attributes, seed, request, why)
            if is_compiling or _c._len_torch_dispatch_stack() > 0:
                return self._through_torch(values, attributes, seed, request)
        seen, given, is_plain, requires_grad = contract.scan(values)
        if not is_plain:
            return self._through_torch(values, attributes, seed, request)
        needs_grad = requires_grad and torch.is_grad_enabled()
        signature = contract.bind(values, attributes, seen)
        chosen = _dispatch.select(signature, request, needs_grad)
        if signature.has_index:
            values = contract.with_own_indices(values)
            contract.check_indices(signature, values)
            given = [value for value in flatten(values) if value is not None]
        if needs_grad:
            flat = _short_way.apply(chosen, values, seed, *given)
            if contract.has_list_outputs:
                return tuple(unflatten(iter(flat), signature.layout.output_lengths))
            return flat
        outputs = run_forward(chosen, dict(zip(contract.input_names, values)), seed)
        return tuple(compress(outputs, contract.is_public))

    def _through_torch(
        self, values: Sequence[Value], attributes: Sequence[Any], seed: Any, request: str
    ) -> tuple[Any, ...]:
        self.contract.check_kinds(values)
        packed = pack(self.contract.input_rows, self.contract.with_own_indices(values))
        output = self.fwd(*packed, *attributes, *self._seed(attributes, seed), request)
        return tuple(compress(self._outputs(output), self.contract.is_public))

    def _define(self, name: str, schema: str, implementation: Any, fake: Any) -> Any:
        _LIBRARY.define(f"{name}{schema}")
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"pelt_kernels::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.pelt_kernels, name).default

    def _outputs(self, output: Any) -> Sequence[Any]:
        """All outputs, of which torch returns a single one as it is."""
        return (output,) if len(self.contract.output_rows) == 1 else output

    def _seed(self, attributes: Sequence[Any], seed: Any) -> tuple[Tensor | None, ...]:
        """The seed as the registered operator takes it, where it has one: a tensor [] on the CPU;
        None without dropout, as a graph for a GPU is captured whole only if all of it is there.
        """
        contract = self.contract
        if not contract.has_seed:
            return ()
        if not attributes[contract.attribute_names.index("dropout_p")]:
            return (None,)
        if isinstance(seed, Tensor):
            return (seed,)
        return (torch.full((), seed, dtype=torch.int64, device="cpu"),)

    def _bind(self, args: Sequence[Any]) -> tuple[Signature, dict[str, Value]]:
        """The signature and the named inputs, from an operator's arguments."""
        contract, rest = self.contract, iter(args)
        values = unpack(contract, rest)
        attributes = [next(rest) for _ in contract.attribute_rows]
        signature = contract.bind(values, attributes)
        if signature.has_index:
            contract.check_indices(signature, values)
        return signature, dict(zip(contract.input_names, values))

    def _select(self, args: Sequence[Any]) -> tuple[Chosen, dict[str, Value], int]:
        """What serves the call, its named inputs and its seed."""
        signature, inputs = self._bind(args)
        seed = args[-2] if self.contract.has_seed else None
        return _dispatch.select(signature, args[-1]), inputs, 0 if seed is None else int(seed)

    def _forward(self, *args: Any) -> tuple[Any, ...]:
        if forward_ad._current_level >= 0:  # tangents do not come through torch to here
            raise NotImplementedError(
                f"{self.contract.name}: expected no forward-mode differentiation of a graph that "
                "holds the operator; differentiate the function that the graph was made from"
            )
        return _as_torch_returns(run_forward(*self._select(args)))

    def _fake_forward(self, *args: Any) -> tuple[Any, ...]:
        signature, _ = self._bind(args)  # no backend is chosen: sizes may be symbols
        shapes = self.contract.output_shapes(signature)
        return _as_torch_returns(
            [_empty_output(signature, row, shapes[row.name]) for row in self.contract.output_rows]
        )

    def _split(self, args: Sequence[Any]) -> tuple[dict[str, Any], dict[str, bool], list[Any]]:
        """Backward's arguments: gradients and saved outputs by name, needs, and then forward's
        arguments.

        An input whose gradient is dy itself is not saved: it is None here, and an attribute says
        that it was there.
        """
        contract = self.contract
        names = contract.gradient_names + contract.saved_names
        named = dict(zip(names, args))
        needs = dict(zip(contract.backward_names, args[len(names)]))
        check_count(contract.name, "needs", len(contract.backward_names), args[len(names)])
        rest = iter(args[len(names) + 1 :])
        packed: list[Any] = []
        for row in contract.input_rows:
            packed += [None] if row.grad_is_dy else [next(rest) for _ in range(argument_count(row))]
        return named, needs, [*packed, *rest]

    def _backward(self, *args: Any) -> list[Tensor]:
        named, needs, forward_args = self._split(args)
        chosen, inputs, seed = self._select(forward_args)
        self.contract.check_outputs(chosen, named)
        found = run_backward(chosen, needs, named, inputs, seed)
        # Contiguous, as the fake's are. The short way takes a gradient as it is in memory.
        return [grad.contiguous() for grad in flat_grads(self.contract, needs, inputs, found)]

    def _fake_backward(self, *args: Any) -> list[Tensor]:
        _, needs, forward_args = self._split(args)
        inputs = dict(zip(self.contract.input_names, unpack(self.contract, iter(forward_args))))
        like = {name: new_empty(inputs[name]) for name in needs}
        return flat_grads(self.contract, needs, inputs, like)

    def _keep(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keeps for the formula the inputs that backward needs, the saved outputs, and the
        arguments after the inputs.
        """
        contract, rest, output = self.contract, iter(inputs), self._outputs(output)
        packed = [[next(rest) for _ in range(argument_count(row))] for row in contract.input_rows]
        ctx.flags = [
            tuple(flags) for _, *flags in packed
        ]  # of each row: none, or which elements of a list are there
        ctx.rest = list(rest)
        seed = [ctx.rest.pop(-2)] if contract.has_seed else []
        kept = [
            value for (value, *_), row in zip(packed, contract.input_rows) if not row.grad_is_dy
        ]
        saved = [out for out, row in zip(output, contract.output_rows) if row.is_saved]
        ctx.lengths = lengths_of([*saved, *kept, *seed])
        ctx.save_for_backward(*flatten([*saved, *kept, *seed]))
        ctx.likes = [
            like_of(out) for out, row in zip(output, contract.output_rows) if row.is_differentiable
        ]

    def _differentiate(self, ctx: Any, *grads: Any) -> tuple[Any, ...]:
        """The autograd formula of the forward operator: one call of the backward operator.

        torch needs None for each argument, or for a list of tensors (and for any empty list) a list
        of the same length.
        """
        if _formula.is_batched(flatten(grads)):
            return _formula.each(lambda *dys: self._differentiate(ctx, *dys), grads)
        contract = self.contract
        tensors = unflatten(iter(ctx.saved_tensors), ctx.lengths)
        saved, kept = tensors[: len(contract.saved_rows)], iter(tensors[len(contract.saved_rows) :])
        dys = [grad for grad, row in zip(grads, contract.output_rows) if row.is_differentiable]
        values = [None if row.grad_is_dy else next(kept) for row in contract.input_rows]
        rest = [*ctx.rest[:-1], *kept, ctx.rest[-1]]  # the attributes, the seed, the request
        needs_grad = iter(ctx.needs_input_grad)
        asked = []
        for flags in ctx.flags:
            asked.append(_any(next(needs_grad)))
            for _ in flags:
                next(needs_grad)
        packed = [[value, *flags] for value, flags in zip(values, ctx.flags)]
        fresh: Iterator[Tensor] = iter(())
        needs = [need for need, row in zip(asked, contract.input_rows) if not row.grad_is_dy]
        if any(needs) and _formula.needs_formula(flatten(dys)):
            signature, inputs = self._bind([*chain(*packed), *rest])
            seed = rest[-2] if contract.has_seed else None
            names = compress(contract.backward_names, needs)
            wanted = [found for name in names for found in _flat_names(name, inputs[name])]
            fresh = iter(_formula.backward(signature, wanted, flatten(dys), inputs, seed))
        elif any(needs):
            named = _named_grads(contract, dys, ctx.likes)
            given = chain(*(p for p, row in zip(packed, contract.input_rows) if not row.grad_is_dy))
            fresh = iter(self.bwd(*named.values(), *saved, needs, *given, *rest))
        result: list[Any] = []
        for row, need, value, flags in zip(contract.input_rows, asked, values, ctx.flags):
            if isinstance(value, list):
                result.append([next(fresh) if need else None for _ in value])
            elif row.grad_is_dy:
                result.append(dys[0] if need else None)
            else:
                result.append(next(fresh) if need else None)
            result += map(no_gradient, flags)
        return (*result, *map(no_gradient, rest))


def _named_grads(contract: Contract, dys: Sequence[Any], likes: Sequence[Any]) -> dict[str, Any]:
    return {name: filled(dy, like) for name, dy, like in zip(contract.gradient_names, dys, likes)}


def _is_watched() -> bool:
    """A mode, a transform, a tracer or forward-mode differentiation is active, which may have to
    see the call.
    """
    return (
        _c._len_torch_dispatch_stack() > 0
        or _c._are_functorch_transforms_active()
        or _c._is_tracing()
        or forward_ad._current_level >= 0
    )


def _as_torch_returns(outputs: Sequence[Any]) -> Any:
    """All outputs as an operator returns them to torch: a single one as it is."""
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _empty_output(signature: Signature, row: Any, shape: Any) -> Any:
    dtype = output_dtype(signature, row)
    if row.is_list:
        return [torch.empty(s, dtype=dtype, device=signature.device) for s in shape]
    return torch.empty(shape, dtype=dtype, device=signature.device)


def _flat_names(name: str, value: Value) -> list[tuple[str, int]]:
    """An input's tensors that are there, as `Signature.flat_names` gives them."""
    if isinstance(value, (list, tuple)):
        return [(name, i) for i, v in enumerate(value) if v is not None]
    return [] if value is None else [(name, -1)]


def _any(need: Any) -> bool:
    return any(need) if isinstance(need, (list, tuple)) else bool(need)


def forward_schema(contract: Contract) -> str:
    """Inputs, attributes, seed and backend to all outputs."""
    outputs = ", ".join("Tensor[]" if row.is_list else "Tensor" for row in contract.output_rows)
    return f"({_arguments(contract, contract.input_rows)}) -> ({outputs})"


def backward_schema(contract: Contract) -> str:
    """Gradients, saved outputs, which gradients are wanted, forward's arguments to a flat list."""
    named = [(f"d{row.name}", row) for row in contract.differentiable_rows]
    named += [(row.name, row) for row in contract.saved_rows]
    outputs = ", ".join(f"Tensor{'[]' if row.is_list else ''} {name}" for name, row in named)
    kept = [row for row in contract.input_rows if not row.grad_is_dy]
    return f"({outputs}, bool[] needs, {_arguments(contract, kept)}) -> Tensor[]"


def _arguments(contract: Contract, input_rows: Sequence[Input]) -> str:
    inputs = [_argument(row) for row in input_rows]
    attributes = [f"{row.type} {row.name}" for row in contract.attribute_rows]
    seed = ["Tensor? seed"] if contract.has_seed else []
    return ", ".join([*inputs, *attributes, *seed, "str backend"])


def _argument(row: Input) -> str:
    if not row.is_list:
        return f"Tensor{'?' if row.is_optional else ''} {row.name}"
    return f"Tensor[] {row.name}" + (f", bool[] has_{row.name}" if row.is_optional else "")


def argument_count(row: Input) -> int:
    """How many arguments an input takes: a list whose elements may be absent comes as those there,
    and which they are.

    torch's autograd formulas see a list of tensors, but not one with None in it: its gradients
    would be lost.
    """
    return 2 if row.is_list and row.is_optional else 1


def pack(rows: Sequence[Input], values: Sequence[Value]) -> list[Any]:
    """Inputs as the registered operator takes them."""
    packed: list[Any] = []
    for row, value in zip(rows, values):
        if argument_count(row) == 2:
            packed += [[v for v in value if v is not None], [v is not None for v in value]]
        else:
            packed.append(value)
    return packed


def unpack(contract: Contract, packed: Iterator[Any]) -> list[Value]:
    """The way back from `pack`. Raises ValueError for a list that is not as long as it is said."""
    values: list[Value] = []
    for row in contract.input_rows:
        value = next(packed)
        if argument_count(row) == 2:
            there, flags = iter(value), next(packed)
            check_count(contract.name, row.name, sum(flags), value)
            value = [next(there) if flag else None for flag in flags]
        values.append(value)
    return values


def no_gradient(argument: Any) -> Any:
    """No gradient for an argument, in the structure that torch needs."""
    return [] if isinstance(argument, (list, tuple)) and not len(argument) else None


def flat_grads(
    contract: Contract, needs: dict[str, bool], inputs: dict[str, Value], grads: dict[str, Value]
) -> list[Tensor]:
    """The gradients that were asked for, in the contract's order, lists expanded, absent elements
    left out.
    """
    flat: list[Tensor] = []
    for name in contract.backward_names:
        if needs[name]:
            value, grad = inputs[name], grads[name]
            if isinstance(value, (list, tuple)):
                flat += [g for v, g in zip(value, grad) if v is not None]
            else:
                flat.append(grad)
    return flat


def new_empty(value: Value) -> Value:
    """Memory like an input's, or each of a list's."""
    if isinstance(value, (list, tuple)):
        return [new_empty(v) for v in value]
    return None if value is None else value.new_empty(value.shape)
