"""The arguments of public functions, before they are a contract's: numbers, flags, names, groups of
fields; factors that are learned, seeds, and what autocast casts.

Each is returned as the contract's rows take it, or TypeError says what was expected; its row checks
whether a value is allowed. These run at every call, so the usual case is tested first.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._gate import accumulator
from ._values import is_autocast

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
            f"{operator}: expected {name} in [-2**63, 2**63), got an integer of "
            f"{value.bit_length()} bits"
        )
    return value


def flag(operator: str, name: str, value: Any) -> bool:
    """True or False."""
    if value is True or value is False:
        return value
    raise refuse(operator, name, "True or False", value)


def group(operator: str, name: str, value: Any, kind: type[Group]) -> Group:
    """A group of fields such as `LearnedGate`, whose first two are tensors. The rows check the
    types of its fields, but take None for an input that is not there, so None is refused here.
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
        return index, index  # the weights' own rows report it
    if down.ndim != 3 and up.ndim != 3:
        raise ValueError(
            f"{operator}: expected a bank beside {name}, got weights of {down.ndim} and {up.ndim} "
            "dimensions; leave it out or give one of them a leading dimension"
        )
    return index if down.ndim == 3 else None, index if up.ndim == 3 else None


def fold(
    operator: str, name: str, factor: float | Tensor, *operands: Tensor
) -> tuple[float, tuple[Tensor, ...]]:
    """The number for the kernel and what it multiplies: a kernel takes no factor that is learned,
    so of a tensor [] it is 1 and the operands times it, rounded once to their dtype, and autograd
    gives the tensor its gradient.

    Raises ValueError for another tensor than one floating number on the operands' device, and
    TypeError for what is neither tensor nor number.
    """
    if not isinstance(factor, Tensor):
        return number(operator, name, factor), operands
    dense(operator, name, factor)
    if factor.ndim or not factor.is_floating_point():
        raise ValueError(
            f"{operator}: expected {name} as a number or a tensor [], got {list(factor.shape)} in "
            f"{str(factor.dtype).removeprefix('torch.')}"
        )
    for operand in operands:
        dense(operator, f"what {name} multiplies", operand)
    devices = [operand.device for operand in operands if isinstance(operand, Tensor)]
    if len(devices) < len(operands):
        return 1.0, operands  # the operands' own rows report it
    if factor.device not in (*devices, torch.device("cpu")):
        raise ValueError(f"{operator}: expected {name} on {devices[0]}, got {factor.device}")
    return 1.0, tuple(_times(operand, factor) for operand in operands)


def default_scale(operator: str, q: Tensor) -> float:
    """Attention's 1 / sqrt(E); 1 where there is no E, which the contract refuses."""
    size = dense(operator, "q", q).shape[-1] if isinstance(q, Tensor) and q.ndim else 0
    return size**-0.5 if size else 1.0


def _times(operand: Tensor, factor: Tensor) -> Tensor:
    acc = accumulator(operand.dtype)
    return (operand.to(acc) * factor.to(acc)).to(operand.dtype)


def cast_activation(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is on for its device, as `torch.nn.functional.linear`
    casts it; float64 and everything else stay as they are. Parameters stay and are read as masters.
    """
    if (
        isinstance(x, Tensor)
        and is_autocast(x.device)
        and x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    ):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def draw_seed(operator: str, dropout_p: float, seed: int | None) -> Any:
    """A dropout's seed: the given one, or one from torch's default CPU generator, whose state
    activation checkpointing restores.

    Where each operation is recorded it stays a tensor, so that a traced or compiled function draws
    again at each call, and `torch.vmap` for each sample if it is asked to
    (``randomness="different"``). Nothing is drawn without dropout, so that a model in evaluation
    leaves the generator as it was.
    """
    if seed is not None:
        return whole(operator, "seed", seed)
    if not dropout_p:
        return 0
    drawn = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device="cpu")
    return drawn if is_recorded() else int(drawn)


def is_recorded() -> bool:
    """Is each operation recorded: by `torch.compile`, `torch.export` or `torch.jit.trace`, by a
    transform of `torch.func`, or by a mode that may have no numbers, such as fake tensors'?
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_tracing()
    )
