"""Names of a package that load on first use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any


def on_first_use(
    package: dict[str, Any], modules: Sequence[str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A package's ``__getattr__`` and ``__dir__``, by which the names in its ``__all__`` load.

    Args:
        package: the package's globals, with ``__all__``.
        modules: those of it that hold the names, looked through in this order, so the ones that
            load less come first.
    """
    own = package["__name__"]

    def get(name: str) -> Any:
        for module in modules if name in package["__all__"] else ():
            found = import_module(f".{module}", own)
            if hasattr(found, name):
                package[name] = getattr(found, name)  # the next look-up does not come here
                return package[name]
        raise AttributeError(f"module {own!r} has no attribute {name!r}")

    return get, lambda: sorted({*package, *package["__all__"]})
