"""A value made of parameters, kept as long as they are what they were."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


class Computed(Generic[Value]):
    """Makes a value once, without gradient, and again after one of its parameters has changed.

    A change is noticed by torch's version counters, which every in-place operation raises, an
    optimizer's step and `load_state_dict` included; only writing through ``.data`` does not.
    """

    def __init__(self) -> None:
        self._held: tuple[list[weakref.ref[Tensor]], tuple[Hashable, ...], Value] | None = None

    def __call__(
        self, parameters: Sequence[Tensor], make: Callable[[], Value], *settings: Hashable
    ) -> Value:
        """The value that `make` gives for the parameters and settings as they are now."""
        state = (settings, *((p._version, p.data_ptr()) for p in parameters))
        held = self._held
        # References and not addresses, which a later parameter may have been given.
        if (
            held is not None
            and held[1] == state
            and all(ref() is p for ref, p in zip(held[0], parameters, strict=True))
        ):
            return held[2]
        # A tensor made in inference mode could not be used by a later forward with gradients.
        with torch.inference_mode(False), torch.no_grad():
            made = make()
        self._held = [weakref.ref(p) for p in parameters], state, made
        return made

    def __reduce__(self) -> tuple[type[Computed[Value]], tuple[()]]:
        """A copy has parameters of its own, so it begins without a value."""
        return type(self), ()

    def forget(self) -> None:
        """Lets go of the value."""
        self._held = None
