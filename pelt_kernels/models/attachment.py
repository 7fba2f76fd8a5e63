"""What is left on a model while parts are in it, and is taken off again: hooks, notes, and views of
its configurations.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from . import attention as _attention  # noqa: F401  # makes "pelt" known to transformers
from .attention_config import PELT, PELT_SDPA, configs_of, with_attention
from .sdpa import SDPA

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Attachment:
    """Something that can be put into a model by hooks, notes and views, and taken off again.

    Attributes:
        model: the model.
        uses_pelt_attention: whether its attention is "pelt" meanwhile.
        views: its configurations that name the attention, each with a view of it.
    """

    uses_pelt_attention: bool = False

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._handles: list[Any] = []
        self._marked: list[tuple[nn.Module, str]] = []
        self.views: list[tuple[Any, Any]] = []

    def hook(self, handle: Any) -> None:
        """Keeps the handle of a hook, to remove it."""
        self._handles.append(handle)

    def mark(self, module: nn.Module, name: str, value: Any) -> None:
        """Leaves a note on a module of the base model. One that is a module itself would be
        registered as its child by setattr; a note is no ownership.
        """
        object.__setattr__(module, name, value)
        self._marked.append((module, name))

    def clear(self) -> None:
        """Takes hooks and notes off."""
        for handle in self._handles:
            handle.remove()
        for module, name in self._marked:
            module.__dict__.pop(name, None)
        self._handles, self._marked = [], []

    def make_views(self) -> list[tuple[Any, Any]]:
        """The configurations in the model that name the attention, each with a view of it that
        names "pelt", or "pelt_sdpa" where no part needs it: the modules of a stack share one.
        """
        own = PELT if self.uses_pelt_attention else PELT_SDPA
        return [
            (config, with_attention(config, own))
            for config in configs_of(self.model.base_model)
            if own == PELT or config._attn_implementation == SDPA
        ]

    def show_views(self) -> None:
        """The modules read the views' attention."""
        self._use_configs({id(base): view for base, view in self.views})

    def hide_views(self) -> None:
        """The modules read the base model's attention."""
        self._use_configs({id(view): base for base, view in self.views})

    @contextmanager
    def shown_to_generate(self) -> Iterator[None]:
        """Inside, the model itself, whose generate() makes the masks for a cache of fixed size, is
        seen with "pelt" attention, too.
        """
        base = self.model.config
        for config, view in self.views if self._handles and self.uses_pelt_attention else ():
            if config is base:
                self.model.config = view
        try:
            yield
        finally:
            self.model.config = base

    def _use_configs(self, instead: dict[int, Any]) -> None:
        """The attention implementation is read from the configuration that a stack's modules share;
        they are given a view of it, because another model may have been built from it.
        """
        for module in self.model.base_model.modules() if instead else ():
            config = getattr(module, "config", None)
            if id(config) in instead:
                module.config = instead[id(config)]
