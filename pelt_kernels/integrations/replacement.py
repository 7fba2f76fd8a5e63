"""What a module of another library becomes while it is accelerated: an object of a subclass of its
own class.

The object, its parameters and its names stay, so state dicts, references, hooks and checks by
``isinstance`` hold, and a copy or a pickle is accelerated as the model is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

UNPADDING = "unpadding"  # in the place of an operator, of a model whose layers do without padding


class Accelerated:
    """The first base of every class that a library's module is given; the library's own class is
    the other one.

    Such a class stands in a module of this package, by whose name a pickle finds it, and reads the
    library's state at each call.

    Attributes:
        pelt_backend: the backend that `accelerate` was given.
    """

    pelt_backend: str | None = None

    def pelt_attach(self) -> None:
        """Called once, after the class and the backend were set: for what a class cannot hold, such
        as the name of an attention function in a config. An error here undoes the whole model.
        """

    def pelt_detach(self) -> None:
        """Called before the library's class comes back: undoes `pelt_attach`."""

    def _get_name(self) -> str:
        """What a module is called where a model is printed: PEFT reads a layer's kind there."""
        return library_class(self).__name__  # type: ignore[arg-type]


@dataclass(frozen=True)
class Replacement:
    """A module of another library, and what was found for it.

    Attributes:
        name: its name in the model.
        accelerated: the subclass of its class, an `Accelerated`; None: it is left alone.
        operator: what serves it.
        reason: of a module that is left alone why, as the rest of a sentence; of one that is served
            the calls that go the library's own way all the same, if there are any.
    """

    name: str
    module: nn.Module
    accelerated: type[nn.Module] | None
    operator: str = ""
    reason: str = ""


def library_class(module: nn.Module) -> type[nn.Module]:
    """The class that a library gave a module, whether it is accelerated now or not."""
    kinds: Any = type(module).__mro__
    return next(kind for kind in kinds if not issubclass(kind, Accelerated))


def check_in_memory(name: str, module: nn.Module) -> None:
    """Raises ValueError for a module whose weights were not loaded."""
    if any(parameter.is_meta for parameter in module.parameters()):
        raise ValueError(
            f"accelerate: expected weights in memory, got {name} on the meta device; load them "
            "first"
        )
