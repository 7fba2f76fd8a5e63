"""Tokens whose positions begin behind a prefix."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..methods import PrefixTuningConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .stack import Stack

CACHES = ("cache", "past_key_values")  # as versions of transformers call it


@dataclass
class ShiftedPositions:
    """Forward pre-hook of a decoder: position p, given or counted, becomes p + P.

    Attributes:
        length: P.
        names: of the decoder's arguments, in order.
    """

    length: int
    names: tuple[str, ...]

    def __call__(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given = dict(zip(self.names, args)) | kwargs
        positions: Tensor | None = given.get("position_ids")
        if positions is None:
            read = given.get("input_ids")
            read = given["inputs_embeds"] if read is None else read
            cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
            past = 0 if cache is None else cache.get_seq_length()
            positions = (torch.arange(read.shape[1], device=read.device) + past)[None]
        return (), given | {"position_ids": positions + self.length}


def shifted_positions(
    model: PreTrainedModel, stacks: Sequence[Stack], config: PrefixTuningConfig | None
) -> ShiftedPositions | None:
    """The hook, where the config asks for it.

    Raises:
        ValueError: a model whose tokens' positions cannot be given.
    """
    if config is None or not config.shift_positions:
        return None
    names = tuple(inspect.signature(model.base_model.forward).parameters)
    if len(stacks) > 1 or not stacks[0].is_causal or "position_ids" not in names:
        raise ValueError(
            "PrefixTuningConfig: expected a decoder that takes position_ids with "
            f"shift_positions=True, got {type(model).__name__}"
        )
    return ShiftedPositions(config.prefix_length, names)
