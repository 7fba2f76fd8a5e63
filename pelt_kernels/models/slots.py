"""Where a transformers family keeps the places that methods work on: one dataclass of attribute
paths for each shape.

A family is one entry here and nothing elsewhere. Paths are relative to a layer, except `layers` and
`embeddings`, which are relative to the encoder (transformers' ``model.base_model``).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Slots:
    """Attribute paths of a post-LayerNorm encoder.

    `attention` is the module that calls the attention function and receives `attention_mask`;
    `ffn_norm` is the LayerNorm that is given the sum of the FFN's output and its residual, the last
    thing in a layer.
    """

    layers: str = "encoder.layer"
    embeddings: str = "embeddings"
    attention: str = "attention.self"
    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    attention_output: str = "attention.output.dense"
    ffn_in: str = "intermediate.dense"
    ffn_out: str = "output.dense"
    ffn_norm: str = "output.LayerNorm"


BERT = Slots()
DISTILBERT = Slots(
    layers="transformer.layer",
    attention="attention",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    attention_output="attention.out_lin",
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
    for field in fields(Slots):
        if field.name not in ("layers", "embeddings"):
            _follow(layers[0], getattr(slots, field.name), f"a layer of {type(model).__name__}")
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


def place_of(layer: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The parent module of a path inside a layer and the last name of the path."""
    parent, _, name = path.rpartition(".")
    return (layer.get_submodule(parent) if parent else layer), name


def _follow(root: nn.Module, path: str, who: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError as error:
        raise ValueError(
            f"get_pelt_model: expected {who} to have {path!r}, got none: {error}"
        ) from error
