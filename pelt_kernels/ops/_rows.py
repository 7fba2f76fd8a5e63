"""The rows of a contract's tables, parsed from text, and the checks of a call against them: shapes,
dtypes, devices, choices; a sentence each.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._arguments import dense
from ._values import Value

Shape = tuple[str, ...]
ACTIVATION_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SIXTEEN_BIT = (torch.float16, torch.bfloat16)
_TYPES: dict[str, tuple[type, ...]] = {
    "float": (float, int, torch.SymFloat, torch.SymInt),
    "int": (int, torch.SymInt),
    "str": (str,),
    "bool": (bool, torch.SymBool),
}


@dataclass(frozen=True)
class Input:
    """One input row of a contract."""

    name: str
    kind: str
    shapes: tuple[Shape, ...]
    is_optional: bool
    is_list: bool
    bound: str | None
    grad_is_dy: bool
    is_view: bool

    @property
    def is_differentiable(self) -> bool:
        return self.kind in ("activation", "parameter")

    @property
    def includes_bound(self) -> bool:
        return self.kind == "count"


@dataclass(frozen=True)
class Attribute:
    """One attribute row: a number or a word, with its default and the values it may take: words
    with ``|`` between them, or an interval, where ``(-inf, inf)`` is every finite number.
    """

    name: str
    type: str
    default: Any
    allowed: str

    @property
    def choices(self) -> tuple[str, ...]:
        return (
            tuple(self.allowed.split(" | "))
            if self.type in ("str", "str[]") and self.allowed
            else ()
        )

    @property
    def is_list(self) -> bool:
        return self.type.endswith("[]")

    def allows(self, number: float) -> bool:
        """Does the number lie in the row's interval? NaN lies in none."""
        low, high = (float(end) for end in self.allowed[1:-1].split(","))
        above = number >= low if self.allowed.startswith("[") else number > low
        return above and (number <= high if self.allowed.endswith("]") else number < high)


@dataclass(frozen=True)
class Output:
    """One output row: ``differentiable``, ``saved`` (kept for backward), ``private`` (not given to
    the caller).
    """

    name: str
    kind: str
    is_list: bool
    is_differentiable: bool
    is_saved: bool
    is_private: bool


def rows_of(table: str) -> list[str]:
    """The lines of a table that say something."""
    return [line.strip() for line in table.strip().splitlines() if line.strip()]


def parse_input(row: str) -> Input:
    """``name  kind  shapes``, see `pelt_kernels.ops._contract`."""
    match = re.fullmatch(r"(\w+)\s+(\w+)(?:\((\w+)\))?([?*]*)\s+(\[.*\])((?:\s+[a-z=]+)*)", row)
    if match is None:
        raise ValueError(f"not an input row: {row!r}")
    name, kind, bound, marks, shapes, words = match.groups()
    parsed = tuple(tuple(re.findall(r"\w+", shape)) for shape in shapes.split("|"))
    flags = [word in words.split() for word in ("grad=dy", "view")]
    return Input(name, kind, parsed, "?" in marks, "*" in marks, bound, *flags)


def parse_attribute(row: str) -> Attribute:
    """``name  type = default  allowed values``."""
    match = re.fullmatch(r"(\w+)\s+(\w+(?:\[\])?)\s*=\s*(\S+)\s*(.*)", row)
    if match is None:
        raise ValueError(f"not an attribute row: {row!r}")
    name, kind, default, allowed = match.groups()
    convert: dict[str, Callable[[str], Any]] = {
        "float": float,
        "int": int,
        "str": str,
        "bool": lambda text: text == "true",
    }
    value = [] if kind.endswith("[]") else convert[kind](default)
    return Attribute(name, kind, value, allowed)


def parse_output(row: str) -> Output:
    """``name  kind  flags``."""
    name, kind, *flags = row.split()
    words = ("differentiable", "saved", "private")
    return Output(name, kind.rstrip("*"), kind.endswith("*"), *(word in flags for word in words))


def elements(operator: str, row: Input, value: Value) -> Sequence[Tensor | None]:
    """An input's tensors, one or a list's; TypeError for anything else."""
    if row.is_list:
        if not isinstance(value, (list, tuple)):
            raise TypeError(
                f"{operator}: expected {row.name} as a list of tensors, got {type(value).__name__}"
            )
        found: Sequence[Any] = value
    else:
        found = (value,)
    for element in found:
        if element is None:
            if not row.is_optional:
                raise TypeError(f"{operator}: {row.name} is required, got None")
        elif not isinstance(element, Tensor):
            raise TypeError(
                f"{operator}: expected {row.name} as a torch.Tensor, got {type(element).__name__}"
            )
        else:
            dense(operator, row.name, element)
    return found


def bind_shape(
    operator: str,
    row: Input,
    i: int,
    tensor: Tensor,
    sizes: dict[str, Any],
    source: dict[str, str],
) -> None:
    """Finds the alternative whose rank and known sizes fit, and names its new sizes."""
    label = f"{row.name}[{i}]" if row.is_list else row.name
    known = {letter: _at(sizes, letter, i) for shape in row.shapes for letter in shape}
    for shape in row.shapes:
        if len(shape) == tensor.ndim and all(
            known[letter] is None or known[letter] == size
            for letter, size in zip(shape, tensor.shape)
        ):
            break
    else:
        raise ValueError(f"{operator}: {_shape_sentence(row, label, tensor, known, source)}")
    for letter, size in zip(shape, tensor.shape):
        if known[letter] is None:
            source[letter] = label
            if letter.endswith("_i"):
                column = sizes.setdefault(letter, [])
                column.extend([None] * (i + 1 - len(column)))
                column[i] = size
            else:
                sizes[letter] = size


def check_not_zero(
    operator: str, letter: str, sizes: dict[str, Any], source: dict[str, str]
) -> None:
    """Raises ValueError if a size is 0 that must not be."""
    size = sizes.get(letter, ())
    if any(s == 0 for s in (size if isinstance(size, list) else (size,))):
        raise ValueError(
            f"{operator}: expected a size {letter} of at least 1, got 0 (from {source[letter]})"
        )


def _at(sizes: dict[str, Any], letter: str, i: int) -> int | None:
    """The size known for a letter, if any; a shape may also name a number, such as the 1 of a
    gate's bias.
    """
    if letter.isdigit():
        return int(letter)
    if letter.endswith("_i"):
        column = sizes.get(letter, [])
        return column[i] if i < len(column) else None
    return sizes.get(letter)


def _shape_sentence(
    row: Input, label: str, tensor: Tensor, known: dict[str, int | None], source: dict[str, str]
) -> str:
    fitting = [shape for shape in row.shapes if len(shape) == tensor.ndim] or list(row.shapes)
    wanted = " or ".join(
        f"[{', '.join(shape)}] = "
        f"[{', '.join(str(known[s]) if known[s] is not None else s for s in shape)}]"
        for shape in fitting
    )
    letters = dict.fromkeys(
        s for shape in fitting for s in shape if known[s] is not None and not s.isdigit()
    )
    origin = ", ".join(f"{s}={known[s]} from {source[s]}" for s in letters)
    return f"expected {label}{wanted}{f' ({origin})' if origin else ''}, got {list(tensor.shape)}"


def check_dtypes(
    operator: str, rows: Sequence[Input], first: str, like: Tensor, values: dict[str, Value]
) -> frozenset[str]:
    """Checks dtype and device of each input against the first activation; returns the float32
    master parameters.
    """
    dtype = like.dtype
    if dtype not in ACTIVATION_DTYPES:
        raise ValueError(
            f"{operator}: expected {first} in float32, float16 or bfloat16, got {_name(dtype)}"
        )
    master = set()
    for row in rows:
        allowed: tuple[torch.dtype, ...] = (dtype,)
        if row.kind == "parameter" and dtype in SIXTEEN_BIT:
            allowed = (dtype, torch.float32)
        elif row.kind == "bool":
            allowed = (torch.bool,)
        elif row.kind in ("index", "count"):
            allowed = (torch.int64,)
        for tensor in elements(operator, row, values[row.name]):
            if tensor is None:
                continue
            if tensor.dtype not in allowed:
                wanted = " or ".join(_name(d) for d in allowed)
                raise ValueError(
                    f"{operator}: expected {row.name} in {wanted} ({first} is {_name(dtype)}), got "
                    f"{_name(tensor.dtype)}"
                )
            if tensor.device != like.device:
                raise ValueError(
                    f"{operator}: expected {row.name} on {like.device} (where {first} is), got "
                    f"{tensor.device}"
                )
            if row.kind == "parameter" and tensor.dtype != dtype:
                master.add(row.name)
    return frozenset(master)


def check_attributes(operator: str, rows: Sequence[Attribute], attributes: dict[str, Any]) -> None:
    """Checks each attribute's type, and its value against those its row allows."""
    for row in rows:
        value = attributes[row.name]
        if row.is_list and not isinstance(value, (list, tuple)):
            raise TypeError(
                f"{operator}: expected {row.name} as a list, got {type(value).__name__}"
            )
        for i, item in enumerate(value if row.is_list else (value,)):
            label = f"{row.name}[{i}]" if row.is_list else row.name
            types = _TYPES[row.type.removesuffix("[]")]
            if not isinstance(item, types) or (isinstance(item, bool) and bool not in types):
                raise TypeError(
                    f"{operator}: expected {label} as {types[0].__name__}, got "
                    f"{type(item).__name__}"
                )
            if row.choices and item not in row.choices:
                raise ValueError(
                    f"{operator}: expected {label} to be one of {', '.join(row.choices)}, got "
                    f"{item!r}"
                )
            # A number that torch.compile keeps open is checked where it has its value.
            if (
                isinstance(item, (int, float))
                and (row.allowed and not row.choices)
                and not row.allows(item)
            ):
                raise ValueError(f"{operator}: expected {label} in {row.allowed}, got {item}")


def check_count(operator: str, name: str, wanted: int, found: Sequence[Any]) -> None:
    """Checks the length of a list that is given to a registered operator by hand."""
    if len(found) != wanted:
        raise ValueError(f"{operator}: expected {wanted} elements of {name}, got {len(found)}")


def check_output(
    operator: str,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    shapes: Sequence[Sequence[int]],
    found: Sequence[Tensor],
) -> None:
    """Checks a gradient or a saved output, or a list of them, against what forward gives."""
    check_count(operator, name, len(shapes), found)
    for shape, tensor in zip(shapes, found):
        got = (list(tensor.shape), tensor.dtype, tensor.device)
        if got != (list(shape), dtype, device):
            raise ValueError(
                f"{operator}: expected {name} {list(shape)} {_name(dtype)} on {device} as forward "
                f"gives it, got {got[0]} {_name(got[1])} on {got[2]}"
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
