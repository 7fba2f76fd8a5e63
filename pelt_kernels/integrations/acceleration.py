"""One line that puts this project's operators into a model of another library, and the way back.

A library is one row of `LIBRARIES` and one file with the function ``replacements(model, backend)``,
which looks at every module and changes none; it raises for a model that cannot be served at all.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple

from torch import nn

from ..ops._dispatch import check_name
from .replacement import UNPADDING, Accelerated, Replacement, library_class
from .report import Report, report_of

# The file of each library, by a module of the library's that is loaded wherever a model of it is.
LIBRARIES = {
    "peft.tuners.lora.layer": "peft_lora",
    "peft.peft_model": "peft_prefix",
    "adapters.methods.adapter_layer_base": "adapters_library",
}


class _Before(NamedTuple):
    """A module, and what it was before it became `now`."""

    module: Any
    kind: type[nn.Module]
    backend: str | None
    now: type[nn.Module]


def accelerate(model: nn.Module, *, backend: str | None = None, unpad: bool = False) -> Report:
    """Has the layers of a model that PEFT or AdapterHub's library ``adapters`` made run on this
    project's operators, in place.

    The model keeps its objects, parameters, state dict and checkpoints, and each layer reads its
    library's state at every call, so adapters that are added, switched, merged or deleted later are
    served too. Modules that were wrapped since are served after another call; the rest stays as it
    is. `restore` gives the library's own layers back.

    Args:
        model: a `PeftModel`, or any model with layers of PEFT's or of ``adapters``' in it.
        backend: the backend that its layers ask for; None: the one in force at each call.
        unpad: the layers of an encoder with PEFT's LoRA compute real tokens only; what differs is
            said at `PeltModel.set_unpadding`.

    Returns:
        which modules are served by which operator, and which are left alone and why;
        ``print(report)`` reads well.

    Raises:
        ValueError: no layer of a known library is in the model; a version of the library that this
            was not tested with; an adapter is merged; the backend is unknown or cannot serve the
            model; `unpad` of one whose layers cannot do without padding, or without PEFT's LoRA.
            TypeError: the model is no module. Nothing was changed then.
    """
    report, _ = _accelerate(model, backend, unpad)
    return report


@contextmanager
def accelerated(
    model: nn.Module, *, backend: str | None = None, unpad: bool = False
) -> Iterator[Report]:
    """`accelerate` for the length of a block; afterwards every module is as it was before it."""
    report, before = _accelerate(model, backend, unpad)
    try:
        yield report
    finally:
        _undo(before)


def restore(model: nn.Module) -> None:
    """Gives every accelerated module of a model its library's own class back.

    A model without such modules stays as it is. Raises TypeError for what is no module.
    """
    _check_module("restore", model)
    for module in model.modules():
        if isinstance(module, Accelerated):
            _become(module, library_class(module), None)


def _accelerate(model: nn.Module, backend: str | None, unpad: bool) -> tuple[Report, list[_Before]]:
    _check_module("accelerate", model)
    if backend is not None:
        check_name(backend, "accelerate: expected backend as")
    found = _replacements(model, backend)
    if unpad:
        found = _unpadded(found)
    before: list[_Before] = []
    try:
        for each in found:
            kind = each.accelerated or library_class(each.module)
            before.append(_swap(each.module, kind, backend))
    except BaseException:
        _undo(before)
        raise
    return report_of(found), before


def _replacements(model: nn.Module, backend: str | None) -> list[Replacement]:
    found: list[Replacement] = []
    for loaded, file in LIBRARIES.items():
        if loaded in sys.modules:
            library = import_module(f".{file}", __package__)
            found += library.replacements(model, backend)
    if not found:
        raise ValueError(
            "accelerate: expected a model with adapters of PEFT's or of the library adapters, got "
            f"{type(model).__name__} with none; make one with peft.get_peft_model or add_adapter"
        )
    return found


def _unpadded(found: list[Replacement]) -> list[Replacement]:
    """The replacements of a model whose layers compute real tokens only. Raises ValueError."""
    if "peft.tuners.lora.layer" in sys.modules:
        from .peft_unpadding import unpadded

        found = [unpadded(each) for each in found]
    if not any(each.operator == UNPADDING for each in found):
        raise ValueError(
            "accelerate: expected a model with PEFT's LoRA for unpad=True, got one without; leave "
            "unpad out"
        )
    return found


def _swap(module: Any, kind: Any, backend: str | None) -> _Before:
    """Gives a module another class, its library's or a subclass of that one, and the backend."""
    before = _Before(module, type(module), getattr(module, "pelt_backend", None), kind)
    _become(module, kind, backend)
    return before


def _undo(before: list[_Before]) -> None:
    """Gives modules back what they were, the last one first, unless they changed since."""
    for module, kind, backend, now in reversed(before):
        if type(module) is now:
            _become(module, kind, backend)


def _become(module: Any, kind: Any, backend: str | None) -> None:
    was = type(module)
    if was is not kind and issubclass(was, Accelerated):
        module.pelt_detach()
    module.__class__ = kind
    if not issubclass(kind, Accelerated):
        module.__dict__.pop("pelt_backend", None)
        return
    module.pelt_backend = backend
    if was is not kind:
        try:
            module.pelt_attach()
        except BaseException:
            module.__dict__.pop("pelt_backend", None)
            module.__class__ = library_class(module)
            raise


def _check_module(who: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: expected model as a torch.nn.Module, got {type(model).__name__}")
