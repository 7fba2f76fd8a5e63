"""The rows of a contract's tables, parsed from text."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Shape = tuple[str, ...]


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
