"""What kind of work a PTX instruction is, by its name: the family that a count is told under, and
the pipe of a multiprocessor that it keeps busy.
"""

from __future__ import annotations

import re
from functools import cache

# The first pattern that a name begins with is its family.
FAMILIES = (
    (r"mma\.", "mma"),
    (r"ldmatrix\.", "ldmatrix"),
    (r"cp\.async\.", "cp.async"),
    (r"(shfl|vote|match|activemask)\b", "shuffles and votes"),
    (r"(bar|barrier|membar|fence)\.", "barriers"),
    (r"(atom|red)\.", "atomics"),
    (r"ld\.param\.", "loads of parameters"),
    (r"ld\.(\w+\.)*shared\.", "shared loads"),
    (r"st\.(\w+\.)*shared\.", "shared stores"),
    (r"(ld|ldu)\.", "global loads"),  # with those whose space only the address tells
    (r"st\.", "global stores"),
    (r"(ex2|lg2|rcp|rsqrt|sqrt|sin|cos|tanh|div\.\w+\.f32|div\.full)\b", "special functions"),
    (r"(setp|selp|slct|set)\.|(and|or|xor|not|mov)\.pred", "predicates and selects"),
    (r"(mov|cvta)\.", "moves"),
    (r"cvt\.", "conversions"),
    (r"(bra|ret|exit|call|trap|nanosleep)\b", "branches"),
    (r"copysign\.", "integer and logic"),  # two logical instructions in one
    (r"(abs|add|sub|mul|mad|fma|neg|min|max)\.(\w+\.)*(f32|f16x2|f16|bf16x2|bf16)\b",
     "float arithmetic"),
    (r"(abs|add|addc|sub|subc|mul|mad|mul24|div|rem|neg|min|max|sad)\.(\w+\.)*[su](16|32|64)\b",
     "integer and logic"),
    (r"(and|or|xor|not|shl|shr|shf|bfi|bfe|prmt|lop3|popc|clz|brev|bfind)\b", "integer and logic"),
)  # fmt: skip
NAMES = tuple(dict.fromkeys(family for _, family in FAMILIES))
# What the assembler mostly folds into other instructions: registers that are the same, bits that
# stay, parameters, which instructions name as operands.
_FOLDED = re.compile(r"mov\.|cvta\.|ld\.param\.|cvt\.(u32\.u64|u64\.u32|u16\.u32|u32\.u16)$")
# Integer products run where floats are multiplied.
_PRODUCT = re.compile(r"(mul|mad)\.(\w+\.)*[su](16|32|64)\b")
_NARROWING = re.compile(r"cvt\.rn\.(relu\.|satfinite\.)?(bf16|f16)(x2)?\.f32$")


@cache
def family_of(name: str) -> str:
    """Raises ValueError where no family is known: nothing is counted as something else."""
    for pattern, family in FAMILIES:
        if re.match(pattern, name):
            return family
    raise ValueError(f"expected a PTX instruction of a known family, got '{name}'")


@cache
def is_folded(name: str) -> bool:
    """Does it mostly not become an instruction of its own?"""
    return _FOLDED.match(name) is not None


@cache
def pipe_of(name: str) -> str:
    """``f32``, ``int`` or ``special``, where an instruction keeps one of those lanes busy."""
    family = family_of(name)
    if is_folded(name):
        return ""
    if family == "float arithmetic" or _PRODUCT.match(name):
        return "f32"
    if family in ("integer and logic", "predicates and selects") or _NARROWING.match(name):
        return "int"
    return "special" if family == "special functions" else ""
