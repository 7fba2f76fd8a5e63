"""``torch.ops.pelt_kernels.<operator>``: an operator by its contract's names, with defaults.

It is made of PyTorch's own operations and the registered forward (CompositeImplicitAutograd), so
autograd, `torch.compile` and `torch.export` see through it. The outputs are the contract's public
ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ._arguments import draw_seed
from ._contract import Contract
from ._rows import Attribute, Input
from ._values import Value


def entry_schema(contract: Contract) -> str:
    """The required inputs in the contract's order; then by name only the others, the attributes,
    the seed and the backend. All outputs that callers see.
    """
    required = [f"Tensor {row.name}" for row in contract.input_rows if _is_required(row)]
    named = [_named(row) for row in contract.input_rows if not _is_required(row)]
    named += [_attribute(row) for row in contract.attribute_rows]
    named += ["SymInt? seed=None"] if contract.has_seed else []
    named += ["str? backend=None"]
    outputs = ", ".join("Tensor[]" if row.is_list else "Tensor" for row in contract.public_rows)
    return f"({', '.join(required)}, *, {', '.join(named)}) -> ({outputs})"


def entry(contract: Contract, operator: Callable[..., Any]) -> Callable[..., Any]:
    """What the entry runs: `operator` on the contract's inputs and attributes."""
    required = [row.name for row in contract.input_rows if _is_required(row)]

    def call(*args: Any, **named: Any) -> Any:
        given = {**dict(zip(required, args)), **named}
        values = _inputs(contract.input_rows, given)
        attributes = _attributes(contract.attribute_rows, given)
        seed = given.get("seed")
        if seed is None:
            seed = draw_seed(contract.name, given.get("dropout_p", 0.0), None)
        outputs = operator(values, attributes, seed, given.get("backend"))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    return call


def _is_required(row: Input) -> bool:
    return not row.is_optional and not row.is_list


def _named(row: Input) -> str:
    if row.is_list:
        return f"Tensor{'?' if row.is_optional else ''}[]? {row.name}=None"
    return f"Tensor? {row.name}=None"


def _attribute(row: Attribute) -> str:
    """A schema has no word for infinity, nor for an empty list of some types: None stands for such
    a default.
    """
    if row.is_list:
        return f"{row.type}? {row.name}=None"
    if row.type == "float" and not math.isfinite(row.default):
        return f"float? {row.name}=None"
    literal = f'"{row.default}"' if row.type == "str" else str(row.default)
    return f"{row.type} {row.name}={literal}"


def _inputs(rows: Sequence[Input], given: Mapping[str, Any]) -> list[Value]:
    """The inputs in the contract's order. An optional list that is left out has as many elements
    as the first list, all of them absent.
    """
    count = next((len(given.get(row.name) or ()) for row in rows if row.is_list), 0)
    absent = {True: [None] * count, False: []}
    return [
        (given.get(row.name) or absent[row.is_optional]) if row.is_list else given.get(row.name)
        for row in rows
    ]


def _attributes(rows: Sequence[Attribute], given: Mapping[str, Any]) -> list[Any]:
    """The attributes in the contract's order."""
    values = [given.get(row.name, row.default) for row in rows]
    return [row.default if value is None else value for row, value in zip(rows, values)]
