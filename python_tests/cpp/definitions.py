"""The table of what each arithmetic instruction computes in one lane, from the text of the PTX ISA:
on integers as Python has them, without a width, and on floats as fractions that are rounded once.
definitions_of_integers.py and definitions_of_floats.py fill it.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

# Bits of exponent and of fraction.
FORMATS = {"f32": (8, 23), "f16": (5, 10), "bf16": (8, 7)}
# What PTX leaves open: any value is right.
ANY = object()


@dataclass(frozen=True)
class Definition:
    destinations: tuple[str, ...]
    sources: tuple[str, ...]
    compute: Callable[..., Any]  # a value, or one for each destination


DEFINITIONS: dict[str, Definition] = {}
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


def define(name: str, destinations: str, sources: str, compute: Callable[..., Any]) -> None:
    DEFINITIONS[name] = Definition(tuple(destinations.split()), tuple(sources.split()), compute)


# ---- values as bits ----


def bits_of_type(kind: str) -> int:
    return {"pred": 1, "count": 32, "table": 8}.get(kind) or int(kind.lstrip("subf"))


def decoded(kind: str, bits: int) -> Any:
    """The value of a type that stands in the low bits."""
    if kind == "f16":
        return struct.unpack("<e", struct.pack("<H", bits & 0xFFFF))[0]
    if kind in FORMATS:
        bits <<= 16 if kind == "bf16" else 0
        return struct.unpack("<f", struct.pack("<I", bits & 0xFFFFFFFF))[0]
    width = bits_of_type(kind)
    bits &= (1 << width) - 1
    return bits - (1 << width) if kind[0] == "s" and bits >> (width - 1) else bits


def encoded(kind: str, value: Any, width: int) -> int:
    """A value as a register of so many bits holds it: an integer is cut to its type's width, and
    then extended to the register's.
    """
    if kind not in FORMATS:
        return int(decoded(kind, int(value))) & ((1 << width) - 1)
    if kind == "f16":
        return int(struct.unpack("<H", struct.pack("<e", value))[0])
    bits = int(struct.unpack("<I", struct.pack("<f", value))[0])
    return bits >> 16 if kind == "bf16" else bits


def rounded(
    value: Fraction, zero: float = 0.0, kind: str = "f32", rounds_down: bool = False
) -> float:
    """The nearest number of a format, the even one of two, or the next one below; `zero` for 0."""
    if value == 0:
        return zero
    exponent_bits, fraction_bits = FORMATS[kind]
    bias = 2 ** (exponent_bits - 1) - 1
    is_negative, size = value < 0, abs(value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1
    exponent = max(exponent, 1 - bias)
    count, rest = divmod(size / Fraction(2) ** (exponent - fraction_bits), 1)
    if rounds_down:
        count += is_negative and rest > 0
    else:
        count += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and count % 2)
    # One more than the largest fraction is the next exponent's first number, or infinity.
    bits = int(count) + ((exponent + bias - 1) << fraction_bits)
    infinity = ((1 << exponent_bits) - 1) << fraction_bits
    bits = min(bits, infinity - 1 if rounds_down and not is_negative else infinity)
    return float(decoded(kind, bits | is_negative << (exponent_bits + fraction_bits)))
