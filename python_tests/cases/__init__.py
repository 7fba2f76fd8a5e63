"""The cases on which every backend is compared with the reference and timed: named sizes and options,
from which inputs are drawn by reading the contract. A module for each operator holds its CASES.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pelt_kernels.ops._contract import Contract, Value
from pelt_kernels.ops._rows import Input, Shape

Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]


@dataclass(frozen=True, eq=False)  # so that results can be kept for a case
class Case:
    """One case of an operator.

    ``inputs`` names the optional inputs that are there, with commas, and which of the contract's
    shapes they and others have where it is not the first: ``"bank w_down, b_up, gate per row"``.
    ``bank x`` has a dimension more in front, ``transposed x`` the two in the other order, and what
    stands behind a name is a word of `SHAPES`. A list has an element for each element of the sizes
    that end in ``_i``, or as many as a number says, ``"2 extra_weight"``; of lists with absent
    elements those are there that are named, all of them by ``gate`` and one by ``gate[1]``.

    ``fill`` sets whole inputs to a constant, ``layout`` makes activations views: "offset" and
    "strided" are slices of a wider tensor with the last stride 1, "transposed" has another stride.
    """

    id: str
    sizes: dict[str, Any]
    inputs: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)
    fill: dict[str, float] = field(default_factory=dict)
    layout: str = "contiguous"
    is_inference: bool = False  # has no gradient
    is_quick: bool = False  # on the short list for sanitizers and slow interpreters


SHAPES: dict[str, Shape] = {
    "per sample": ("B",),
    "per row": ("B", "S"),
    "per head": ("B", "H"),
    "shared by samples": ("1", "H", "S", "N"),
    "shared by heads": ("B", "1", "S", "N"),
    "shared by all": ("1", "1", "S", "N"),
}
PHRASE = re.compile(rf"(?:(bank|transposed|\d+) )?(\w+)(?:\[(\d+)\])?(?: ({'|'.join(SHAPES)}))?")


def module_of(operator: str) -> ModuleType:
    """The module with an operator's CASES and the DRAWS of inputs that are not normal."""
    return importlib.import_module(f"cases.{operator}")


def cases_of(operator: str) -> list[Case]:
    """What an operator is tested on."""
    return module_of(operator).CASES


def case_of(operator: str, name: str) -> Case:
    """One of them."""
    return next(case for case in cases_of(operator) if case.id == name)


def given_in(case: Case) -> set[str]:
    """The inputs that a case names."""
    matches = map(PHRASE.fullmatch, case.inputs.split(", "))
    return {match[2] for match in matches if match}


def uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Values in [0, 1): gates."""
    return torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float64)


def around_one(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """1 + 0.1 N(0, 1): norm weights."""
    return 1 + 0.1 * normal(shape, generator)


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Of the normal distribution: everything else."""
    return torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64)


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
    drawn_on: str = "cpu",
) -> list[Value]:
    """Inputs in the contract's order, already rounded to ``dtype`` (parameters to float32 with
    ``master``). A GPU draws other values than a CPU, and large inputs a hundred times faster.
    """
    generator = torch.Generator(drawn_on).manual_seed(seed)
    draws = getattr(module_of(contract.name), "DRAWS", {})

    def draw(row: Input, shape: tuple[int, ...], i: int) -> Tensor:
        value = _draw(row, shape, case, i, generator, draws.get(row.name))
        value = value.to(_dtype_of(row, dtype, master)).to(device)
        return _with_layout(value, case.layout) if row.kind == "activation" else value

    return _make(contract, case, draw)


def make_blanks(
    contract: Contract, case: Case, dtype: torch.dtype, device: str = "cpu", master: bool = False
) -> list[Value]:
    """The same, but for their values: what a backend decides by, at the cost of nothing."""

    def blank(row: Input, shape: tuple[int, ...], i: int) -> Tensor:
        return torch.empty(shape, dtype=_dtype_of(row, dtype, master), device=device)

    return _make(contract, case, blank)


def _make(
    contract: Contract, case: Case, make: Callable[[Input, tuple[int, ...], int], Tensor]
) -> list[Value]:
    values: list[Value] = []
    for row, shapes in zip(contract.input_rows, shapes_of(contract, case)):
        elements = [
            None if s is None else make(row, tuple(_size(case, letter, i) for letter in s), i)
            for i, s in enumerate(shapes)
        ]
        values.append(elements if row.is_list else (elements[0] if elements else None))
    return values


def _dtype_of(row: Input, dtype: torch.dtype, master: bool) -> torch.dtype:
    if row.bound is not None:
        return torch.int64
    if row.kind == "bool":
        return torch.bool
    return torch.float32 if master and row.kind == "parameter" else dtype


def shapes_of(contract: Contract, case: Case) -> list[list[Shape | None]]:
    """For each input the shape of its one tensor, or of each element of its list; None for an element
    that is absent, and no shape for an input that is.
    """
    length = max((len(size) for size in case.sizes.values() if isinstance(size, tuple)), default=0)
    shapes: dict[str, list[Shape | None]] = {}
    for row in contract.input_rows:
        is_there = not (row.is_list or row.is_optional)
        if row.is_list and (
            row.is_optional or any(letter.endswith("_i") for letter in row.shapes[0])
        ):
            shapes[row.name] = [None if row.is_optional else row.shapes[0]] * length
        else:
            shapes[row.name] = [row.shapes[0]] if is_there else []
    rows = {row.name: row for row in contract.input_rows}
    for phrase in case.inputs.split(", ") if case.inputs else ():
        match = PHRASE.fullmatch(phrase)
        if match is None or match[2] not in rows:
            raise ValueError(f"{contract.name}, case {case.id}: no such input {phrase!r}")
        before, name, element, behind = match.groups()
        shape = _shape(rows[name], before, behind)
        if shape is None:
            raise ValueError(f"{contract.name}, case {case.id}: no such shape {phrase!r}")
        if element is not None:
            shapes[name][int(element)] = shape
        elif before and before.isdigit():
            shapes[name] = [shape] * int(before)
        else:
            shapes[name] = [shape] * max(len(shapes[name]), 1)
    return list(shapes.values())


def _shape(row: Input, before: str | None, behind: str | None) -> Shape | None:
    """The one of a row's shapes that words choose, the first without any; None if there is none."""
    first, *others = row.shapes
    if before == "bank":
        return next((shape for shape in others if shape[1:] == first), None)
    if before != "transposed" and not behind:
        return first
    wanted = SHAPES[behind] if behind else first[::-1]
    return wanted if wanted in others else None


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
    generator: torch.Generator,
    draw: Draw | None,
) -> Tensor:
    if row.bound is not None:
        limit = _size(case, row.bound, i) + row.includes_bound
        return torch.randint(0, limit, shape, generator=generator, device=generator.device)
    if row.kind == "bool":
        mask = torch.rand(shape, generator=generator, device=generator.device) < 0.7
        return torch.full(shape, bool(case.fill[row.name])) if row.name in case.fill else mask
    if row.name in case.fill:
        return torch.full(shape, case.fill[row.name], dtype=torch.float64)
    if draw is not None:
        return draw(shape, generator)
    scale = max(shape[-1], 1) ** -0.5 if row.kind == "parameter" and len(shape) > 1 else 1.0
    return normal(shape, generator) * scale


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
