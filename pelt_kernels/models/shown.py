"""What others read from a model's class: the base model's arguments and the kind of its head."""

from __future__ import annotations

import inspect
from typing import Any

_made: dict[tuple[Any, Any], Any] = {}


def shown_as(kind: Any, base: Any) -> Any:
    """A subclass of `kind` whose forward shows the signature of a base model's and whose name has
    that class's name in it.

    transformers.Trainer keeps the columns of a data set that ``forward`` names, takes those of them
    for labels that belong to the class, and knows question answering by the class's name.
    """
    if (kind, base) in _made:
        return _made[kind, base]
    call = kind.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call(self, *args, **kwargs)

    forward.__doc__ = call.__doc__
    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    members = {"forward": forward, "SHOWN": (kind, base)}
    members |= {"__doc__": kind.__doc__, "__module__": kind.__module__}
    _made[kind, base] = type(f"Pelt{base.__name__}", (kind,), members)
    return _made[kind, base]


def empty(kind: Any, base: Any) -> Any:
    """An object of that subclass that nothing has filled yet, as a copy and a pickle begin."""
    made = shown_as(kind, base)
    return made.__new__(made)
