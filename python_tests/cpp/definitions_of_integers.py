"""The arithmetic instructions on integers, bits and predicates."""

from __future__ import annotations

import math
import operator
import struct
from fractions import Fraction
from functools import partial
from typing import Any

from definitions import ANY, COMPARISONS, bits_of_type, define, rounded
from ptx import SHARED_WINDOW


def quotient(a: int, b: int) -> Any:
    return math.trunc(Fraction(a, b)) if b else ANY


def remainder(a: int, b: int) -> Any:
    return a - b * math.trunc(Fraction(a, b)) if b else ANY


def funnel(is_left: bool, wraps: bool, low: int, high: int, count: int) -> int:
    count = count % 32 if wraps else min(count, 32)
    both = high << 32 | low
    return both << count >> 32 if is_left else both >> count


def insert_bits(a: int, b: int, position: int, length: int) -> int:
    for i in range(length & 255):
        to = (position & 255) + i
        if to < 32:
            b = b & ~(1 << to) | (a >> i & 1) << to
    return b


def extract_bits(a: int, position: int, length: int) -> int:
    return (a >> (position & 255)) & ((1 << (length & 255)) - 1)


def permute(a: int, b: int, selector: int) -> int:
    source = struct.pack("<II", a, b)
    result = bytearray()
    for i in range(4):
        choice = selector >> 4 * i & 15
        byte = source[choice & 7]
        result.append((255 if byte > 127 else 0) if choice & 8 else byte)
    return int.from_bytes(result, "little")


def logic(a: int, b: int, c: int, table: int) -> int:
    """Bit i is the table's bit whose number the three operands' bits i spell."""
    result = 0
    for i in range(32):
        row = (a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)
        result |= (table >> row & 1) << i
    return result


def define_integers() -> None:
    for kind in ("s16", "u16", "s32", "u32", "s64", "u64"):
        two = f"{kind} {kind}"
        define(f"mov.{kind}", kind, kind, lambda a: a)
        define(f"add.{kind}", kind, two, operator.add)
        define(f"sub.{kind}", kind, two, operator.sub)
        define(f"mul.lo.{kind}", kind, two, operator.mul)
        define(f"mad.lo.{kind}", kind, f"{two} {kind}", lambda a, b, c: a * b + c)
        define(f"div.{kind}", kind, two, quotient)
        define(f"rem.{kind}", kind, two, remainder)
        define(f"min.{kind}", kind, two, min)
        define(f"max.{kind}", kind, two, max)
        define(f"shr.{kind}", kind, f"{kind} count", operator.rshift)
        define(f"selp.{kind}", kind, f"{two} pred", lambda a, b, p: a if p else b)
        for name, holds in COMPARISONS.items():
            define(f"setp.{name}.{kind}", "pred", two, holds)
        if kind[0] == "s":
            define(f"neg.{kind}", kind, kind, operator.neg)
            define(f"abs.{kind}", kind, kind, abs)
    for kind in ("s32", "u32", "s64", "u64"):
        width = bits_of_type(kind)
        define(f"mul.hi.{kind}", kind, f"{kind} {kind}", lambda a, b, w=width: a * b >> w)
    for kind, wide in (("s16", "s32"), ("u16", "u32"), ("s32", "s64"), ("u32", "u64")):
        define(f"mul.wide.{kind}", wide, f"{kind} {kind}", operator.mul)
    for kind, wide in (("s32", "s64"), ("u32", "u64")):
        define(f"mad.hi.{kind}", kind, f"{kind} {kind} {kind}", lambda a, b, c: (a * b >> 32) + c)
        define(f"mad.wide.{kind}", wide, f"{kind} {kind} {wide}", lambda a, b, c: a * b + c)
    kinds = ("s8", "u8", "s16", "u16", "s32", "u32", "s64", "u64")
    for kind in kinds:
        for source in kinds:
            define(f"cvt.{kind}.{source}", kind, source, lambda a: a)
        define(f"cvt.rn.f32.{kind}", "f32", kind, lambda a: rounded(Fraction(a)))


def define_bits() -> None:
    for kind in ("b16", "b32", "b64"):
        two = f"{kind} {kind}"
        define(f"mov.{kind}", kind, kind, lambda a: a)
        define(f"and.{kind}", kind, two, operator.and_)
        define(f"or.{kind}", kind, two, operator.or_)
        define(f"xor.{kind}", kind, two, operator.xor)
        define(f"not.{kind}", kind, kind, operator.invert)
        define(f"shl.{kind}", kind, f"{kind} count", lambda a, n: a << min(n, 64))
        define(f"shr.{kind}", kind, f"{kind} count", operator.rshift)
        define(f"selp.{kind}", kind, f"{two} pred", lambda a, b, p: a if p else b)
        define(f"setp.eq.{kind}", "pred", two, operator.eq)
        define(f"setp.ne.{kind}", "pred", two, operator.ne)
    for side in ("l", "r"):
        for mode in ("wrap", "clamp"):
            shift = partial(funnel, side == "l", mode == "wrap")
            define(f"shf.{side}.{mode}.b32", "b32", "b32 b32 count", shift)
    define("lop3.b32", "b32", "b32 b32 b32 table", logic)
    define("bfi.b32", "b32", "b32 b32 count count", insert_bits)
    define("bfe.u32", "u32", "u32 count count", extract_bits)
    define("prmt.b32", "b32", "b32 b32 b32", permute)
    define("popc.b32", "u32", "b32", lambda a: bin(a).count("1"))
    define("popc.b64", "u32", "b64", lambda a: bin(a).count("1"))
    define("clz.b32", "u32", "b32", lambda a: 32 - a.bit_length())
    define("brev.b32", "b32", "b32", lambda a: int(f"{a:032b}"[::-1], 2))
    define("mov.pred", "pred", "pred", lambda a: a)
    define("and.pred", "pred", "pred pred", lambda a, b: a and b)
    define("or.pred", "pred", "pred pred", lambda a, b: a or b)
    define("xor.pred", "pred", "pred pred", operator.xor)
    define("not.pred", "pred", "pred", operator.not_)
    define("mov.b32 pack", "b32", "b16 b16", lambda low, high: high << 16 | low)
    define("mov.b64 pack", "b64", "b32 b32", lambda low, high: high << 32 | low)
    define("mov.b32 unpack", "b16 b16", "b32", lambda a: (a, a >> 16))
    define("mov.b64 unpack", "b32 b32", "b64", lambda a: (a, a >> 32))
    for space in ("global", "param", "shared"):
        window = SHARED_WINDOW if space == "shared" else 0
        define(f"cvta.{space}.u64", "u64", "u64", lambda a, w=window: a + w)
        define(f"cvta.to.{space}.u64", "u64", "u64", lambda a, w=window: a - w)
