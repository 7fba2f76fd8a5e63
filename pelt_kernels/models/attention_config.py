"""One configuration seen from two sides: the encoder reads an attention of this package, "pelt" or
"pelt_sdpa", everyone else reads and writes the base model's own object.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

PELT, PELT_SDPA = "pelt", "pelt_sdpa"


class AttentionView:
    """What a view of a configuration adds to the configuration's class: the name of the attention.

    A view has no attributes of its own: its ``__dict__`` is the configuration's, so whatever is
    written through one is read through the other, and the name is written nowhere.
    """

    __slots__ = ("_viewed", "base_attention", "own_attention")
    _viewed: Any
    own_attention: str  # the name that the view gives
    base_attention: str  # the attention of the base model when the view was made

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A configuration made by calling a view's class is one of its own."""
        config_class = cls.__mro__[2]
        return config_class(*args, **kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Not the configuration's own, which would make a dataclass of it again."""

    @property
    def _attn_implementation(self) -> Any:
        """The view's name as long as the base model's attention is what it was."""
        # Asked for in each layer, twice, and each look-up in a configuration takes long.
        found = self.__dict__["_attn_implementation_internal"]
        return self.own_attention if found == self.base_attention else found

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        self._viewed._attn_implementation = value

    @property
    def _attn_implementation_internal(self) -> Any:
        """The configuration's own; a model that is built from a view writes back what it read."""
        return self.__dict__["_attn_implementation_internal"]

    @_attn_implementation_internal.setter
    def _attn_implementation_internal(self, value: Any) -> None:
        if value != self.own_attention:
            self.__dict__["_attn_implementation_internal"] = value

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        """A copy is a view of the copied configuration."""
        return with_attention, (self._viewed, self.own_attention, self.base_attention)


def with_attention(config: Any, own: str, base: str | None = None) -> Any:
    """A view of a configuration that names the attention `own` where the configuration names `base`
    (None: the one it names now). Of a view it is another one of what that one is of.
    """
    config = viewed(config)
    view: Any = object.__new__(_view_class(config.__class__))
    object.__setattr__(view, "__dict__", config.__dict__)
    object.__setattr__(view, "_viewed", config)
    object.__setattr__(view, "own_attention", own)
    object.__setattr__(
        view, "base_attention", config._attn_implementation if base is None else base
    )
    return view


def configs_of(model: Any) -> Iterator[Any]:
    """The configurations in which the modules of a model look up their attention, each once."""
    seen: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal") and id(config) not in seen:
            seen.add(id(config))
            yield config


def viewed(config: Any) -> Any:
    """The configuration itself, of a view or of none."""
    return config._viewed if isinstance(config, AttentionView) else config


@cache
def _view_class(config_class: type) -> type:
    names = {"__module__": config_class.__module__, "__qualname__": config_class.__qualname__}
    return type(config_class.__name__, (AttentionView, config_class), {"__slots__": (), **names})
