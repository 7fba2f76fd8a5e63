"""Test and benchmark cases: named sizes and options from which inputs are drawn by reading the
contract.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ._contract import Contract, Value
from ._rows import Input

Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]


@dataclass(frozen=True, eq=False)  # so that results can be kept for a case
class Case:
    """One case of an operator.

    ``inputs`` names the optional inputs that are there and, after a colon, which shape alternative
    of the contract an input takes (0 is the first); a list has one number per element, ``-`` for a
    missing one: ``"b_down w_down:1 prefix_k:0,1 prefix_index:-,0"``. ``fill`` sets whole inputs to
    a constant, ``layout`` makes activations views: "offset" and "strided" are slices of a wider
    tensor with the last stride 1, "transposed" has another stride.
    """

    id: str
    sizes: dict[str, Any]
    inputs: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)
    fill: dict[str, float] = field(default_factory=dict)
    layout: str = "contiguous"
    is_inference: bool = False  # has no gradient
    is_quick: bool = False  # on the short list for sanitizers and slow interpreters


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Values in [0, 1): gates."""
    return torch.rand(shape, generator=generator, dtype=torch.float64)


def around_one(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """1 + 0.1 N(0, 1): norm weights."""
    return 1 + 0.1 * torch.randn(shape, generator=generator, dtype=torch.float64)


def make_attributes(contract: Contract, case: Case) -> list[Any]:
    """The case's attributes in the contract's order."""
    unknown = set(case.attributes) - set(contract.attribute_names)
    if unknown:
        raise ValueError(f"{contract.name}, case {case.id}: no such attribute {sorted(unknown)}")
    return [case.attributes.get(row.name, row.default) for row in contract.attribute_rows]


def make_inputs(
    contract: Contract,
    case: Case,
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    master: bool = False,
    draws: dict[str, Draw] | None = None,
) -> list[Value]:
    """Inputs in the contract's order, already rounded to ``dtype`` (parameters to float32 with
    ``master``).
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = _chosen(contract, case)
    values: list[Value] = []
    for row in contract.input_rows:
        numbers = chosen.get(row.name, () if row.is_optional or row.is_list else (0,))
        elements: list[Tensor | None] = []
        for i, number in enumerate(numbers):
            if number is None:
                elements.append(None)
                continue
            letters = row.shapes[number]
            shape = tuple(_size(case, letter, i) for letter in letters)
            elements.append(
                _draw(row, shape, case, i, dtype, device, generator, master, draws or {})
            )
        values.append(elements if row.is_list else (elements[0] if elements else None))
    return values


def _chosen(contract: Contract, case: Case) -> dict[str, tuple[int | None, ...]]:
    chosen: dict[str, tuple[int | None, ...]] = {}
    for word in case.inputs.split():
        name, _, numbers = word.partition(":")
        if name not in contract.input_names:
            raise ValueError(f"{contract.name}, case {case.id}: no such input {name!r}")
        chosen[name] = tuple(None if n == "-" else int(n) for n in (numbers or "0").split(","))
    return chosen


def _size(case: Case, letter: str, i: int) -> int:
    if letter.isdigit():
        return int(letter)
    size = case.sizes[letter]
    return size[i] if letter.endswith("_i") else size


def _draw(
    row: Input,
    shape: tuple[int, ...],
    case: Case,
    i: int,
    dtype: torch.dtype,
    device: str,
    generator: torch.Generator,
    master: bool,
    draws: dict[str, Draw],
) -> Tensor:
    if row.bound is not None:
        limit = _size(case, row.bound, i) + row.includes_bound
        return torch.randint(0, limit, shape, generator=generator).to(device)
    if row.kind == "bool":
        mask = torch.rand(shape, generator=generator) < 0.7
        return (
            torch.full(shape, bool(case.fill[row.name])).to(device)
            if row.name in case.fill
            else mask.to(device)
        )
    if row.name in case.fill:
        value = torch.full(shape, case.fill[row.name], dtype=torch.float64)
    elif row.name in draws:
        value = draws[row.name](shape, generator)
    else:
        scale = max(shape[-1], 1) ** -0.5 if row.kind == "parameter" and len(shape) > 1 else 1.0
        value = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
    kind = torch.float32 if master and row.kind == "parameter" else dtype
    value = value.to(kind).to(device)
    return _with_layout(value, case.layout) if row.kind == "activation" else value


def _with_layout(value: Tensor, layout: str) -> Tensor:
    """The same numbers at other addresses."""
    if layout == "contiguous" or value.ndim < 2:
        return value
    if layout == "transposed":
        return value.transpose(-1, -2).contiguous().transpose(-1, -2)
    margin = 8 if layout == "offset" else 3  # "strided": rows that do not start at 16-byte borders
    wide = torch.full(
        (*value.shape[:-1], value.shape[-1] + 2 * margin),
        float("nan"),
        dtype=value.dtype,
        device=value.device,
    )
    view = wide[..., margin : margin + value.shape[-1]]
    view.copy_(value)
    return view
