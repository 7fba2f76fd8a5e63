"""Layers of a model with PEFT's LoRA that compute real tokens only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from peft import LoraModel

from ..methods import Parts
from ..models.checks import why_padded
from ..models.inject import Injection
from ..models.slots import stacks_of
from .peft_attention import AcceleratedLoraModel
from .replacement import UNPADDING, Replacement, library_class

EXCEPTION = (
    "padding is computed, too, without an attention_mask, where there is little of it or some on "
    "the left, under torch.compile, in checkpointed layers, and with adapter_names"
)


class UnpaddedLoraModel(AcceleratedLoraModel):
    """What PEFT puts LoRA's layers into a model with. Meanwhile a method without parts is in the
    model, whose layers do without padding as `PeltModel.set_unpadding` has it.
    """

    pelt_attention: Injection

    def pelt_attach(self) -> None:
        """Puts the hooks of the layers in and shows the views."""
        self.pelt_attention = Injection(self.model, Parts())
        self.pelt_attention.set_packing(True)
        self.pelt_attention.attach()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's. Layers that are told the samples' adapters or offsets need whole samples."""
        by_sample = (kwargs.get(name) for name in ("adapter_names", "alora_offsets"))
        is_padded = any(each is not None for each in by_sample)
        whole = self.pelt_attention.call.unpacked() if is_padded else nullcontext()
        with super()._enable_peft_forward_hooks(*args, **kwargs), whole:
            yield


# By which PEFT names the kind of a tuner; a pickle finds the class by its __qualname__.
UnpaddedLoraModel.__name__ = LoraModel.__name__


def unpadded(found: Replacement) -> Replacement:
    """That of a model with layers that do without padding; any other as it is.

    Raises:
        ValueError: the layers cannot do without.
    """
    if library_class(found.module) is not LoraModel:
        return found
    tuner: Any = found.module
    try:
        stacks = stacks_of(tuner.model)
    except ValueError:  # of another family
        stacks = ()
    why_not = why_padded(tuner.model, stacks, Parts())
    if why_not:
        raise ValueError(f"accelerate: unpad=True: {why_not}")
    return Replacement(found.name, tuner, UnpaddedLoraModel, UNPADDING, EXCEPTION)
