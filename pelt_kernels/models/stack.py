"""One stack of layers of a model with a method in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..methods import Parts
from .call import Call
from .layer_state import LayerPrefix, LayerState
from .slots import AttentionSlots, Slots, embeddings_of, layers_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Stack:
    """A stack of layers of one model, and what is known about each of them.

    Attributes:
        is_causal: whether a token sees no later ones.
        states: of each layer.
        prefixes: of each layer, by the path of the attention that has it.
    """

    def __init__(
        self, model: PreTrainedModel, slots: Slots, parts: Parts, first_number: int, call: Call
    ) -> None:
        self.slots = slots
        self.layers = layers_of(model, slots)
        self.embeddings = embeddings_of(model, slots)
        self.is_causal = slots.is_causal or bool(getattr(model.config, "is_decoder", False))
        self.needs_mask = not self.is_causal and any(
            part.gate_pooling == "masked_mean" for part in parts.gated
        )
        self.states = [
            LayerState(first_number + i, self.needs_mask, call, parts.gate_penalty > 0)
            for i in range(len(self.layers))
        ]
        self.prefixes: list[dict[str, LayerPrefix]] = [{} for _ in self.layers]

    def sites(self) -> Iterator[tuple[str, AttentionSlots]]:
        """The attentions of a layer by what they attend from and to: ``encoder``, ``decoder`` and
        ``cross``.
        """
        for attention in self.slots.attentions:
            yield attention.site or self.slots.name, attention
