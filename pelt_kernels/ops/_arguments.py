"""The arguments of public functions that are no tensors: numbers, flags, names, groups of fields.

Each is given back as the contract's rows take it, or TypeError says what was expected; whether a
value is allowed is told by its row. These run at every call: what is in order is seen first.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import Tensor

Group = TypeVar("Group", bound=tuple)
_INTEGERS = (torch.int32, torch.int16, torch.int8, torch.uint8)


def refuse(operator: str, name: str, expected: str, value: Any) -> TypeError:
    """The error for an argument of a wrong type."""
    return TypeError(f"{operator}: expected {name} as {expected}, got {type(value).__name__}")


def number(operator: str, name: str, value: Any) -> float:
    """A float, from any real number but True and False, which are more likely another argument's
    value. A tensor is none: its gradient would be lost.
    """
    if value.__class__ is float:
        return value
    if not isinstance(value, (float, int, Real)) or isinstance(value, bool):
        raise refuse(operator, name, "a number", value)
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{operator}: expected {name} as a float, got a larger number") from None


def whole(operator: str, name: str, value: Any) -> int:
    """An int of 64 bits."""
    if value.__class__ is not int:
        if not isinstance(value, (int, Integral)) or isinstance(value, bool):
            raise refuse(operator, name, "an integer", value)
        value = int(value)
    if not -(2**63) <= value < 2**63:
        raise ValueError(
            f"{operator}: expected {name} in [-2**63, 2**63), got an integer of"
            f" {value.bit_length()} bits"
        )
    return value


def flag(operator: str, name: str, value: Any) -> bool:
    """True or False."""
    if value is True or value is False:
        return value
    raise refuse(operator, name, "True or False", value)


def group(operator: str, name: str, value: Any, kind: type[Group]) -> Group:
    """A group of fields such as `LearnedGate`, whose first two are tensors: the rows tell of other
    types, but to them None is an input that is not there.
    """
    if not isinstance(value, kind):
        raise refuse(operator, name, f"a {kind.__name__}", value)
    if value[0] is None or value[1] is None:
        field = kind._fields[value[0] is not None]  # type: ignore[attr-defined]
        raise refuse(operator, f"{name}.{field}", "a torch.Tensor", None)
    return value


def groups(operator: str, name: str, values: Any, kind: type[Group]) -> Sequence[Group]:
    """A list or tuple of groups."""
    # A group is a tuple too, of its fields.
    if not isinstance(values, (list, tuple)) or isinstance(values, kind):
        raise refuse(operator, name, f"a list of {kind.__name__}", values)
    for value in values:
        if value.__class__ is not kind and not isinstance(value, kind):
            raise refuse(operator, f"each of {name}", f"a {kind.__name__}", value)
    return values


def dense(operator: str, name: str, value: Any) -> Any:
    """A tensor that may be reshaped; what is none is left to the contract."""
    if isinstance(value, Tensor) and (value.layout is not torch.strided or value.is_nested):
        layout = "a nested tensor" if value.is_nested else str(value.layout)
        raise TypeError(f"{operator}: expected {name} as a dense tensor, got {layout}")
    return value


def counts(value: Any) -> Any:
    """Integers of any width as int64; everything else as it is."""
    return value.long() if isinstance(value, Tensor) and value.dtype in _INTEGERS else value


def indices_of_sides(
    operator: str, name: str, index: Any, down: Any, up: Any
) -> tuple[Tensor | None, Tensor | None]:
    """The index of each of two weights from one for those that are banks, or from a pair."""
    if index is None:
        return None, None
    if isinstance(index, tuple):
        if len(index) != 2:
            raise TypeError(f"{operator}: expected {name} as one index or a pair, got {len(index)}")
        return index
    if not isinstance(index, Tensor):
        raise refuse(operator, name, "a torch.Tensor or a pair", index)
    if not (isinstance(down, Tensor) and isinstance(up, Tensor)):
        return index, index  # the weights' own rows tell
    if down.ndim != 3 and up.ndim != 3:
        raise ValueError(
            f"{operator}: expected a bank beside {name}, got weights of {down.ndim} and {up.ndim}"
            " dimensions; leave it out or give one of them a leading dimension"
        )
    return index if down.ndim == 3 else None, index if up.ndim == 3 else None
