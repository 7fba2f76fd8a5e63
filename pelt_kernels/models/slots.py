"""Where a transformers family keeps the places of a layer that methods work on, as attribute paths.

A family is one entry here, and at most one place in `layer.py`, which is a layer's program. Its
steps, and the slots at which they happen:

    read the padding mask           attention.module
    project, with LoRA or a gate    attention.query, key, value, output, ffn_in, ffn_out
    attend, with a prefix           attention.module, by the attention function it calls
    keep the FFN's input            ffn_in
    experts on the FFN's output     ffn_out
    adapt and normalise             ffn_norm, which ends the layer

What no family here has yet, and where it goes: another attention in the layer (a decoder's over an
encoder) is another `AttentionSlots`; a second stack of layers (an encoder and a decoder) another
`Slots`; two Linears for one target (gate and up projections) or one for three (fused query, key and
value) are decided in `Slots.linear`; a family that normalises before its sub-layers has no
`ffn_norm`, and its adapter stands at `ffn_out`, as AdaMix's experts do. Whether a norm subtracts a
mean, where weights are transposed (Conv1D) and which keys come from a cache is read from the
modules themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class AttentionSlots:
    """Attribute paths of one attention, relative to its layer.

    `module` calls the attention function and receives `attention_mask`; the others are Linears.
    """

    module: str
    query: str
    key: str
    value: str
    output: str


@dataclass(frozen=True)
class Slots:
    """Attribute paths of a stack of post-LayerNorm layers: `layers` and `embeddings` relative to
    the encoder (transformers' ``model.base_model``), the others to a layer.

    `ffn_norm` is the LayerNorm that is given the sum of the FFN's output and its residual, the last
    thing in a layer.
    """

    layers: str
    embeddings: str
    attention: AttentionSlots
    ffn_in: str
    ffn_out: str
    ffn_norm: str

    def linear(self, target: str) -> str:
        """The path of the Linear that a target of a method names (`methods.lora.TARGETS`)."""
        attention = self.attention
        paths = {
            "query": attention.query,
            "key": attention.key,
            "value": attention.value,
            "attention_output": attention.output,
            "ffn_in": self.ffn_in,
            "ffn_out": self.ffn_out,
        }
        return paths[target]

    def in_layer(self) -> Iterator[str]:
        """Every path that a layer has to have."""
        for slot in fields(self.attention):
            yield getattr(self.attention, slot.name)
        yield from (self.ffn_in, self.ffn_out, self.ffn_norm)


BERT = Slots(
    layers="encoder.layer",
    embeddings="embeddings",
    attention=AttentionSlots(
        module="attention.self",
        query="attention.self.query",
        key="attention.self.key",
        value="attention.self.value",
        output="attention.output.dense",
    ),
    ffn_in="intermediate.dense",
    ffn_out="output.dense",
    ffn_norm="output.LayerNorm",
)
DISTILBERT = Slots(
    layers="transformer.layer",
    embeddings="embeddings",
    attention=AttentionSlots(
        module="attention",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        output="attention.out_lin",
    ),
    ffn_in="ffn.lin1",
    ffn_out="ffn.lin2",
    ffn_norm="output_layer_norm",
)

FAMILIES: dict[str, Slots] = {
    "bert": BERT,
    "camembert": BERT,
    "data2vec-text": BERT,
    "distilbert": DISTILBERT,
    "electra": BERT,
    "ernie": BERT,
    "roberta": BERT,
    "xlm-roberta": BERT,
}

# Families whose first position is pad_token_id + 1: the rows before it serve no token.
POSITIONS_AFTER_PADDING = {"camembert", "data2vec-text", "roberta", "xlm-roberta"}


def longest_input(config: PreTrainedConfig) -> int | None:
    """Tokens that a model of this configuration reads; None where it sets no limit."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions is None or config.model_type not in POSITIONS_AFTER_PADDING:
        return positions
    return positions - (config.pad_token_id + 1)


def slots_of(model: PreTrainedModel) -> Slots:
    """The slots of a model's family.

    Raises:
        ValueError: an unknown family, or a model without the places its family should have.
    """
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family not in FAMILIES:
        raise ValueError(
            f"get_pelt_model: expected a model of one of the families {', '.join(FAMILIES)}, got "
            f"{type(model).__name__} "
            f"(model_type {family!r}); a new family is one entry in pelt_kernels/models/slots.py"
        )
    slots = FAMILIES[family]
    layers = layers_of(model, slots)
    for path in slots.in_layer():
        _follow(layers[0], path, f"a layer of {type(model).__name__}")
    return slots


def layers_of(model: PreTrainedModel, slots: Slots) -> nn.ModuleList:
    """The layers of the encoder, in order."""
    layers = _follow(model.base_model, slots.layers, type(model).__name__)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise ValueError(
            f"get_pelt_model: expected {type(model).__name__} to have layers in {slots.layers!r}, "
            f"got {type(layers).__name__} of length {len(list(layers.children()))}"
        )
    return layers


def embeddings_of(model: PreTrainedModel, slots: Slots) -> nn.Module:
    """The module whose output the first layer reads."""
    return _follow(model.base_model, slots.embeddings, type(model).__name__)


def _follow(root: nn.Module, path: str, who: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError as error:
        raise ValueError(
            f"get_pelt_model: expected {who} to have {path!r}, got none: {error}"
        ) from error
