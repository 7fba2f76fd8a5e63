"""Where a transformers family keeps the places of a layer that methods work on, as attribute paths.

A family is one entry here: its stacks of layers, an encoder's, a decoder's or both. The steps of a
layer, which `layer.py` programs, and the slots at which they happen:

    read the padding mask           attention.module
    project, with LoRA or a gate    attention.query, key, value, output, ffn_in, ffn_out
    attend, with a prefix           attention.module, by the attention function it calls
    keep the FFN's input            the first of ffn_in
    experts on the FFN's output     ffn_out
    adapt and normalise             ffn_norm, which ends the layer; where a family normalises before
                                    its sub-layers there is none, and the adapter is at ffn_out

Where weights are transposed (Conv1D) is read from the modules themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from torch import nn

from ..methods.lora import TARGETS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

CROSS = "cross"
PRODUCT, ADDED = "product", "added"


class Place(NamedTuple):
    """A projection: the path of its Linear, and, where one Linear computes several, which of its
    equal ranges of output columns it is.
    """

    path: str
    part: int = 0
    parts: int = 1

    @property
    def is_fused(self) -> bool:
        """Whether the Linear computes other projections, too."""
        return self.parts > 1


@dataclass(frozen=True)
class AttentionSlots:
    """One attention of a layer, by paths relative to the layer.

    Attributes:
        module: calls the attention function and receives the mask.
        query, key, value, output: the Linears; those of a fused one as a `Place`.
        site: empty for the attention over the layer's own tokens; ``cross`` over an encoder's.
        own_mask: empty where the module calls the attention that transformers' attention interface
            names. One that computes its scores by itself is given a mask [B, 1, N, N] of this kind:
            ``product``, not 0 where both tokens are real, or ``added``, 0 in the scores there.
    """

    module: str
    query: str | Place
    key: str | Place
    value: str | Place
    output: str
    site: str = ""
    own_mask: str = ""


@dataclass(frozen=True)
class Slots:
    """A stack of layers: `layers` and `embeddings` are relative to transformers'
    ``model.base_model``, the others to a layer.

    Attributes:
        layers: with ``*`` for each of a group of layers.
        attentions: the layer's own first.
        ffn_in: the Linear that reads the FFN's input; of a gated FFN both, or their places in one.
        ffn_norm: the LayerNorm that is given the sum of the FFN's output and its residual, the last
            thing in a layer; None where norms stand before the sub-layers.
        name: ``encoder`` or ``decoder``.
        is_causal: whether a token sees no later ones, whatever the configuration says.
        is_by_token: whether a layer, but for its attention function, computes each token by itself
            and from nothing but its hidden state.
    """

    layers: str
    embeddings: str
    attentions: tuple[AttentionSlots, ...]
    ffn_in: tuple[str | Place, ...]
    ffn_out: str
    ffn_norm: str | None = None
    name: str = "encoder"
    is_causal: bool = False
    is_by_token: bool = False

    @property
    def attention(self) -> AttentionSlots:
        """The attention over the layer's own tokens."""
        return self.attentions[0]

    def places(self, target: str) -> tuple[tuple[str, Place], ...]:
        """The projections that a target of a method names (`methods.lora.TARGETS`), each with the
        name it has in this layer: an attention over an encoder has its own query, and a gated FFN
        two Linears that read its input.
        """
        if target == "ffn_out":
            return (("ffn_out", Place(self.ffn_out)),)
        if target == "ffn_in":
            names = ("ffn_in", "ffn_in_2")
            return tuple((name, _place(place)) for name, place in zip(names, self.ffn_in))
        field = "output" if target == "attention_output" else target
        found = []
        for attention in self.attentions:
            place = getattr(attention, field)
            name = f"{attention.site}_{target}" if attention.site else target
            found.append((name, _place(place)))
        return tuple(found)

    def linears(self, targets: Collection[str]) -> Iterator[tuple[str, list[tuple[str, Place]]]]:
        """The Linears of a layer in which targets are, each with its projections by name."""
        found: dict[str, list[tuple[str, Place]]] = {}
        for target in TARGETS:
            if target in targets:
                for name, place in self.places(target):
                    found.setdefault(place.path, []).append((name, place))
        yield from found.items()

    def in_layer(self) -> Iterator[str]:
        """Every path that a layer has to have."""
        for attention in self.attentions:
            yield attention.module
            for place in (attention.query, attention.key, attention.value, attention.output):
                yield _place(place).path
        yield from (_place(place).path for place in (*self.ffn_in, self.ffn_out))
        if self.ffn_norm is not None:
            yield self.ffn_norm


def _place(place: str | Place) -> Place:
    return place if isinstance(place, Place) else Place(place)


def target_of(name: str) -> str:
    """The target that a projection's name in a layer belongs to (`Slots.places`)."""
    return name.removeprefix(f"{CROSS}_").removesuffix("_2")


def _attention(
    module: str, names: str = "q_proj k_proj v_proj out_proj", site: str = "", own_mask: str = ""
) -> AttentionSlots:
    """An attention whose Linears are children of its module."""
    query, key, value, output = (f"{module}.{name}" for name in names.split())
    return AttentionSlots(module, query, key, value, output, site, own_mask)


def _fused_attention(module: str, path: str, output: str) -> AttentionSlots:
    """An attention whose query, key and value one Linear computes, in this order."""
    query, key, value = (Place(path, part, 3) for part in range(3))
    return AttentionSlots(module, query, key, value, output)


BERT = Slots(
    layers="encoder.layer",
    embeddings="embeddings",
    attentions=(
        AttentionSlots(
            module="attention.self",
            query="attention.self.query",
            key="attention.self.key",
            value="attention.self.value",
            output="attention.output.dense",
        ),
    ),
    ffn_in=("intermediate.dense",),
    ffn_out="output.dense",
    ffn_norm="output.LayerNorm",
    is_by_token=True,
)
DISTILBERT = Slots(
    layers="transformer.layer",
    embeddings="embeddings",
    attentions=(_attention("attention", "q_lin k_lin v_lin out_lin"),),
    ffn_in=("ffn.lin1",),
    ffn_out="ffn.lin2",
    ffn_norm="output_layer_norm",
    is_by_token=True,
)
GPT2 = Slots(
    layers="h",
    embeddings="wte",
    attentions=(_fused_attention("attn", "attn.c_attn", "attn.c_proj"),),
    ffn_in=("mlp.c_fc",),
    ffn_out="mlp.c_proj",
    name="decoder",
    is_causal=True,
)
LLAMA = Slots(
    layers="layers",
    embeddings="embed_tokens",
    attentions=(_attention("self_attn", "q_proj k_proj v_proj o_proj"),),
    ffn_in=("mlp.gate_proj", "mlp.up_proj"),
    ffn_out="mlp.down_proj",
    name="decoder",
    is_causal=True,
)
ALBERT = Slots(
    layers="encoder.albert_layer_groups.*.albert_layers",
    embeddings="embeddings",
    attentions=(_attention("attention", "query key value dense"),),
    ffn_in=("ffn",),
    ffn_out="ffn_output",
    ffn_norm="full_layer_layer_norm",
    is_by_token=True,
)
DEBERTA = replace(
    BERT,
    is_by_token=False,
    attentions=(
        AttentionSlots(
            module="attention.self",
            query="attention.self.query_proj",
            key="attention.self.key_proj",
            value="attention.self.value_proj",
            output="attention.output.dense",
            own_mask=PRODUCT,
        ),
    ),
)
MPNET = replace(
    BERT,
    attentions=(_attention("attention.attn", "q k v o", own_mask=ADDED),),
    is_by_token=False,
)
MODERNBERT = Slots(
    layers="layers",
    embeddings="embeddings",
    attentions=(_fused_attention("attn", "attn.Wqkv", "attn.Wo"),),
    ffn_in=(Place("mlp.Wi", 0, 2), Place("mlp.Wi", 1, 2)),
    ffn_out="mlp.Wo",
)
VIT = Slots(
    layers="layers",
    embeddings="embeddings",
    attentions=(_attention("attention", "q_proj k_proj v_proj o_proj"),),
    ffn_in=("mlp.fc1",),
    ffn_out="mlp.fc2",
)
CLIP_VISION = replace(VIT, layers="encoder.layers", attentions=(_attention("self_attn"),))
# With a projection behind it, in transformers before 5.24, the tower is not the base model.
CLIP_VISION_INSIDE = replace(
    CLIP_VISION, layers="vision_model.encoder.layers", embeddings="vision_model.embeddings"
)


def _t5(ffn_in: tuple[str, ...]) -> tuple[Slots, Slots]:
    def stack(name: str, attentions: tuple[AttentionSlots, ...]) -> Slots:
        ffn = f"layer.{len(attentions)}.DenseReluDense"
        return Slots(
            layers=f"{name}.block",
            embeddings=f"{name}.embed_tokens",
            attentions=attentions,
            ffn_in=tuple(f"{ffn}.{path}" for path in ffn_in),
            ffn_out=f"{ffn}.wo",
            name=name,
            is_causal=name == "decoder",
        )

    own = _attention("layer.0.SelfAttention", "q k v o")
    cross = _attention("layer.1.EncDecAttention", "q k v o", site=CROSS)
    return stack("encoder", (own,)), stack("decoder", (own, cross))


def _bart(ffn_norm: str | None) -> tuple[Slots, Slots]:
    encoder = Slots(
        layers="encoder.layers",
        embeddings="encoder.embed_tokens",
        attentions=(_attention("self_attn"),),
        ffn_in=("fc1",),
        ffn_out="fc2",
        ffn_norm=ffn_norm,
    )
    decoder = replace(
        encoder,
        layers="decoder.layers",
        embeddings="decoder.embed_tokens",
        attentions=(*encoder.attentions, _attention("encoder_attn", site=CROSS)),
        name="decoder",
        is_causal=True,
    )
    return encoder, decoder


T5 = (_t5(("wi",)), _t5(("wi_0", "wi_1")))
BART, MBART = (_bart("final_layer_norm"),), (_bart(None),)

# Of several variants (versions of transformers, kinds of FFN) a model has one.
FAMILIES: dict[str, tuple[tuple[Slots, ...], ...]] = {
    "albert": ((ALBERT,),),
    "bart": BART,
    "bert": ((BERT,),),
    "camembert": ((BERT,),),
    "clip_vision_model": ((CLIP_VISION,), (CLIP_VISION_INSIDE,)),
    "data2vec-text": ((BERT,),),
    "deberta-v2": ((DEBERTA,),),
    "distilbert": ((DISTILBERT,),),
    "electra": ((BERT,),),
    "ernie": ((BERT,),),
    "gemma": ((LLAMA,),),
    "gemma3_text": ((LLAMA,),),
    "gpt2": ((GPT2,),),
    "llama": ((LLAMA,),),
    "mbart": MBART,
    "mistral": ((LLAMA,),),
    "modernbert": ((MODERNBERT,),),
    "mpnet": ((MPNET,),),
    "mt5": T5,
    "qwen2": ((LLAMA,),),
    "qwen3": ((LLAMA,),),
    "roberta": ((BERT,),),
    "t5": T5,
    "vit": ((VIT,),),
    "xlm-roberta": ((BERT,),),
}

# Families whose first position is pad_token_id + 1: the rows before it serve no token.
POSITIONS_AFTER_PADDING = {"camembert", "data2vec-text", "mpnet", "roberta", "xlm-roberta"}


def longest_input(config: PreTrainedConfig) -> int | None:
    """Tokens that a model of this configuration reads; None where it sets no limit."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions is None or config.model_type not in POSITIONS_AFTER_PADDING:
        return positions
    return positions - (config.pad_token_id + 1)


def stacks_of(model: PreTrainedModel) -> tuple[Slots, ...]:
    """The stacks of a model's family: an encoder before a decoder.

    Raises:
        ValueError: an unknown family, or a model without the places its family should have.
    """
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family not in FAMILIES:
        raise ValueError(
            f"get_pelt_model: expected a model of one of the families {', '.join(FAMILIES)}, got "
            f"{type(model).__name__} "
            f"(model_type {family!r}); a new family is one entry in pelt_kernels/models/slots.py, "
            "and LoRA without gates needs none"
        )
    *others, last = FAMILIES[family]
    for stacks in others:
        if not any(_missing(model, stacks)):
            return stacks
    for error in _missing(model, last):
        raise error
    return last


def layers_of(model: PreTrainedModel, slots: Slots) -> nn.ModuleList:
    """The layers of a stack, in order."""
    who = type(model).__name__
    path, _, inner = slots.layers.partition(".*.")
    layers = _follow(model.base_model, path, who)
    if inner and isinstance(layers, nn.ModuleList):
        groups = [_follow(group, inner, f"a group of {who}") for group in layers]
        layers = nn.ModuleList([layer for group in groups for layer in group.children()])
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise ValueError(
            f"get_pelt_model: expected {who} to have layers in {slots.layers!r}, "
            f"got {type(layers).__name__} of length {len(list(layers.children()))}"
        )
    return layers


def embeddings_of(model: PreTrainedModel, slots: Slots) -> nn.Module:
    """The module whose output the first layer reads."""
    return _follow(model.base_model, slots.embeddings, type(model).__name__)


def _missing(model: PreTrainedModel, stacks: tuple[Slots, ...]) -> Iterator[ValueError]:
    """What a model lacks of the places of some stacks."""
    for slots in stacks:
        try:
            layers = layers_of(model, slots)
            for path in slots.in_layer():
                _follow(layers[0], path, f"a layer of {type(model).__name__}")
        except ValueError as error:
            yield error


def _follow(root: nn.Module, path: str, who: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError as error:
        raise ValueError(
            f"get_pelt_model: expected {who} to have {path!r}, got none: {error}"
        ) from error
