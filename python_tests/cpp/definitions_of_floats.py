"""The arithmetic instructions on floats, by exact fractions that are rounded once."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

from definitions import COMPARISONS, bits_of_type, define, encoded, rounded

LEAST_NORMAL = 2.0**-126


@dataclass(frozen=True)
class Near:
    """A result of the approximate functions: to one unit in the last place, which is within what
    PTX promises of each. Those with .ftz give 0 for what is below the normal range.
    """

    exact: float
    is_flushed: bool

    def holds(self, value: float) -> bool:
        if math.isnan(self.exact) or math.isnan(value):
            return math.isnan(self.exact) and math.isnan(value)
        if math.copysign(1, value) != math.copysign(1, self.exact):
            return False
        if abs(self.exact) >= 2.0**128:
            return math.isinf(value)
        if self.is_flushed and abs(self.exact) < LEAST_NORMAL:
            return value == 0
        return abs(value - self.exact) <= abs(self.exact) * 2.0**-23 + 2.0**-149


def fma(a: float, b: float, c: float, rounds_down: bool = False) -> float:
    if not all(map(math.isfinite, (a, b, c))):
        return a * b + c
    product_sign, sign = math.copysign(1, a) * math.copysign(1, b), math.copysign(1, c)
    is_below = (product_sign < 0 and sign < 0) or (product_sign != sign and rounds_down)
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    return rounded(exact, -0.0 if is_below else 0.0, rounds_down=rounds_down)


def add(a: float, b: float) -> float:
    return fma(a, 1.0, b)


def subtract(a: float, b: float) -> float:
    return fma(b, -1.0, a)


def multiply(a: float, b: float) -> float:
    zero = math.copysign(0.0, math.copysign(1, a) * math.copysign(1, b))
    return fma(a, b, zero)


def divide(a: float, b: float) -> float:
    sign = math.copysign(1, a) * math.copysign(1, b)
    if math.isnan(a) or math.isnan(b) or (a == 0 == b) or (math.isinf(a) and math.isinf(b)):
        return math.nan
    if b == 0 or math.isinf(a):
        return sign * math.inf
    return sign * 0.0 if math.isinf(b) else rounded(Fraction(a) / Fraction(b), sign * 0.0)


def square_root(a: float) -> float:
    if a == 0 or a == math.inf or math.isnan(a):
        return a
    if a < 0:
        return math.nan
    whole = int(Fraction(a) * 2**300)
    root = math.isqrt(whole)
    # One bit more tells that the root is not exact.
    return rounded(Fraction(2 * root + (root * root != whole), 2**151))


def smaller_or_larger(choose: Callable[..., float], a: float, b: float) -> float:
    """A NaN loses against a number, and -0 is less than +0."""
    if math.isnan(a) or math.isnan(b):
        return b if math.isnan(a) else a
    return choose(a, b, key=lambda x: (x, math.copysign(1, x)))


def reciprocal(a: float) -> float:
    return math.copysign(math.inf, a) if a == 0 else 1 / a


def root_or_nan(a: float) -> float:
    return math.nan if a < 0 else math.sqrt(a)


def power_of_2(a: float) -> float:
    return a if math.isnan(a) else 2.0 ** max(min(a, 1000.0), -1000.0)


def logarithm(a: float) -> float:
    if a == 0:
        return -math.inf
    return math.nan if a < 0 else math.log2(a)


def approximation(function: Callable[[float], float], is_flushed: bool, a: float) -> Near:
    if is_flushed and abs(a) < LEAST_NORMAL:
        a = math.copysign(0.0, a)
    return Near(function(a), is_flushed)


def saturated(a: float) -> float:
    return min(max(a, 0.0), 1.0) if a > 0 else 0.0


ROUNDINGS: dict[str, Callable[[Any], int]] = {
    "rni": round,
    "rzi": math.trunc,
    "rmi": math.floor,
    "rpi": math.ceil,
}


def to_integral(rounding: Callable[[Any], int], a: float) -> float:
    return math.copysign(float(rounding(Fraction(a))), a) if math.isfinite(a) else a


def to_integer(rounding: Callable[[Any], int], kind: str, a: float) -> int:
    """Saturates; a NaN is 0, or of 64 bits the highest bit alone."""
    width = bits_of_type(kind)
    if math.isnan(a):
        return 1 << 63 if width == 64 else 0
    low = -(1 << (width - 1)) if kind[0] == "s" else 0
    high = low + (1 << width) - 1
    if math.isinf(a):
        return high if a > 0 else low
    return min(max(rounding(Fraction(a)), low), high)


def to_narrow(kind: str, a: float) -> float:
    return rounded(Fraction(a), math.copysign(0.0, a), kind) if math.isfinite(a) else a


def to_narrow_bits(kind: str, a: float) -> int:
    """The only NaN of the narrow formats that conversions give has all bits set but the sign."""
    return 0x7FFF if math.isnan(a) else encoded(kind, to_narrow(kind, a), 16)


def define_floats() -> None:
    for suffix in ("f32", "rn.f32"):
        define(f"add.{suffix}", "f32", "f32 f32", add)
        define(f"sub.{suffix}", "f32", "f32 f32", subtract)
        define(f"mul.{suffix}", "f32", "f32 f32", multiply)
    define("fma.rn.f32", "f32", "f32 f32 f32", fma)
    define("fma.rm.f32", "f32", "f32 f32 f32", partial(fma, rounds_down=True))
    define("div.rn.f32", "f32", "f32 f32", divide)
    define("rcp.rn.f32", "f32", "f32", partial(divide, 1.0))
    define("sqrt.rn.f32", "f32", "f32", square_root)
    define("neg.f32", "f32", "f32", operator.neg)
    define("abs.f32", "f32", "f32", abs)
    define("min.f32", "f32", "f32 f32", partial(smaller_or_larger, min))
    define("max.f32", "f32", "f32 f32", partial(smaller_or_larger, max))
    define("copysign.f32", "b32", "b32 b32", lambda a, b: a & 1 << 31 | b & ~(1 << 31))
    define("mov.f32", "b32", "b32", lambda a: a)
    define("selp.f32", "b32", "b32 b32 pred", lambda a, b, p: a if p else b)
    define("cvt.sat.f32.f32", "f32", "f32", saturated)
    approximate: dict[str, Callable[[float], float]] = {
        "rcp.approx.ftz.f32": reciprocal,
        "sqrt.approx.ftz.f32": lambda a: a if a == 0 else root_or_nan(a),
        "rsqrt.approx.ftz.f32": lambda a: reciprocal(a if a == 0 else root_or_nan(a)),
        "ex2.approx.f32": power_of_2,
        "ex2.approx.ftz.f32": power_of_2,
        "lg2.approx.ftz.f32": logarithm,
        "tanh.approx.f32": math.tanh,
    }
    for name, function in approximate.items():
        define(name, "f32", "f32", partial(approximation, function, ".ftz." in name))
    ordered = {**COMPARISONS, "ne": lambda a, b: a < b or a > b}
    for name, holds in ordered.items():
        define(f"setp.{name}.f32", "pred", "f32 f32", holds)
        define(
            f"setp.{name}u.f32",
            "pred",
            "f32 f32",
            lambda a, b, holds=holds: holds(a, b) or math.isnan(a) or math.isnan(b),
        )
    define("setp.nan.f32", "pred", "f32 f32", lambda a, b: math.isnan(a) or math.isnan(b))
    define("setp.num.f32", "pred", "f32 f32", lambda a, b: not (math.isnan(a) or math.isnan(b)))
    for name, rounding in ROUNDINGS.items():
        define(f"cvt.{name}.f32.f32", "f32", "f32", partial(to_integral, rounding))
        for kind in ("s32", "u32", "s64", "u64"):
            define(f"cvt.{name}.{kind}.f32", kind, "f32", partial(to_integer, rounding, kind))
    for kind in ("f16", "bf16"):
        narrow = partial(to_narrow_bits, kind)
        define(f"cvt.rn.{kind}.f32", "b16", "f32", narrow)
        define(
            f"cvt.rn.{kind}x2.f32",
            "b32",
            "f32 f32",
            lambda a, b, narrow=narrow: narrow(a) << 16 | narrow(b),
        )
        define(f"cvt.f32.{kind}", "f32", kind, lambda a: a)
