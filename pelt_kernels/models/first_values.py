"""The values that parameters had before they were trained in place, and their way back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .vocabulary import vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def kept(parameter: Tensor) -> Tensor:
    """A copy of a parameter that takes no space on the accelerator."""
    return parameter.detach().clone() if parameter.is_meta else parameter.detach().cpu().clone()


@torch.no_grad()
def put_values(model: PreTrainedModel, values: Mapping[str, Tensor]) -> None:
    """Copies values into the parameters of the same names; of a resized vocabulary the words that
    both have.
    """
    named = dict(model.named_parameters())
    for name, value in values.items():
        parameter = named[name]
        if parameter.shape == value.shape:
            parameter.copy_(value)
        else:
            parameter[: len(value)].copy_(value[: len(parameter)])


def check_first_values(
    model: PreTrainedModel, values: Mapping[str, Tensor], vocabulary: int, who: str
) -> None:
    """Raises ValueError where a parameter cannot have its first value back: it is gone, or has
    another shape for another reason than a vocabulary that was resized since.
    """
    named = dict(model.named_parameters())
    words = vocabulary_of(model)
    for name, value in values.items():
        now = named[name].shape if name in named else None
        is_resized = now == (words, *value.shape[1:]) and len(value) == vocabulary
        if now != value.shape and not is_resized:
            raise ValueError(
                f"{who}: expected {name} {list(value.shape)} as the method met it, got "
                f"{'none' if now is None else list(now)}; put it back, or use "
                "remove(keep_head=True), which leaves a head as it is"
            )
