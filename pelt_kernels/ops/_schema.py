"""A contract in torch's words: schemas of its two operators, and inputs as they take them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from ._checks import check_count
from ._contract import Contract
from ._rows import Input
from ._values import Value


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
    seed = ["int seed"] if contract.has_seed else []
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
    """No gradient for an argument, in the structure that torch asks for."""
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
