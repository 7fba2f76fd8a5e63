"""What a model has to be for a method's parts, told before anything is changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from ..methods import Parts
from ..nn.original import linear_kind, why_not_replaceable
from ..nn.quantised import is_quantised, why_no_gradient
from .lora_targets import Chosen
from .replacement import expert_targets
from .slots import Slots

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_in_memory(model: PreTrainedModel) -> None:
    """Raises ValueError where a hook holds some of the model's weights elsewhere."""
    for name, module in model.named_modules():
        is_empty = any(parameter.is_meta for parameter in module.parameters(recurse=False))
        if is_empty and hasattr(module, "_hf_hook"):
            raise ValueError(
                "get_pelt_model: expected a base model whose weights are in memory, got "
                f"{name} with weights that accelerate loads at each call; load it without "
                "offloading (accelerate.hooks.remove_hook_from_submodules)"
            )


def check_quantised(model: PreTrainedModel) -> None:
    """Raises ValueError where a quantised Linear of the model cannot be trained beside."""
    for name, module in model.named_modules():
        reason = why_no_gradient(module) if is_quantised(module) else ""
        if reason:
            raise ValueError(
                f"get_pelt_model: expected {name} to be quantised so that a gradient passes it, "
                f"got {reason}"
            )


def check_places(model: PreTrainedModel, layers: nn.ModuleList, slots: Slots, parts: Parts) -> None:
    """Raises ValueError unless every module that the parts replace in some layers, other than
    LoRA's, may be replaced, with the first one's name.
    """
    names = {id(module): name for name, module in model.named_modules()}
    for layer in layers:
        for path, kind in _paths(slots, parts):
            module = layer.get_submodule(path)
            kind = linear_kind(module) if kind is nn.Linear else kind
            reason = why_not_replaceable(module, kind)
            if reason:
                raise ValueError(
                    f"get_pelt_model: expected {names[id(module)]} as an nn.{kind.__name__} with "
                    f"floating-point weight and bias, got {reason}"
                )
    pruned = () if parts.pruning is None else parts.pruning.targets
    for layer in layers:
        for path, _ in slots.linears(pruned):
            module = layer.get_submodule(path)
            if is_quantised(module):
                raise ValueError(
                    "PSTConfig: expected floating-point weights, which it prunes, got "
                    f"{names[id(module)]} quantised; load the base model without quantisation"
                )


def check_apart(
    layers: nn.ModuleList, slots: Slots, parts: Parts, chosen: Mapping[int, Chosen]
) -> None:
    """Raises ValueError where LoRA works on a Linear that another part replaces."""
    pruned = () if parts.pruning is None else parts.pruning.targets
    for part, targets in (("pst", pruned), ("adamix", expert_targets(parts))):
        for layer in layers:
            for path, _ in slots.linears(targets):
                linear = chosen.get(id(layer.get_submodule(path)))
                if linear is not None:
                    raise ValueError(
                        "CompositeConfig: expected one part for each place of a layer, got lora "
                        f"and {part} for {linear.name}; leave it out of one part's targets, or "
                        "exclude it from LoRA's"
                    )


def _paths(slots: Slots, parts: Parts) -> Iterator[tuple[str, type[nn.Module]]]:
    """The paths in a layer of what the parts replace, and what has to be there."""
    targets: set[str] = set(expert_targets(parts))
    if parts.prefix is not None and parts.prefix.gated:
        targets.add("query")
    if parts.pruning is not None:
        targets |= set(parts.pruning.targets)
    if parts.adapter is not None and slots.ffn_norm is None:
        targets.add("ffn_out")
    for path, _ in slots.linears(targets):
        yield path, nn.Linear
    if parts.adapter is not None and slots.ffn_norm is not None:
        yield slots.ffn_norm, nn.LayerNorm


def check_chunking(model: PreTrainedModel, parts: Parts, chosen: Mapping[int, Chosen]) -> None:
    """A gate is a mean over a sentence's rows; an FFN that sees slices of it cannot make it."""
    chunk = getattr(model.config, "chunk_size_feed_forward", 0)
    if chunk and parts.has_parallel_adapter:
        raise ValueError(
            "get_pelt_model: expected chunk_size_feed_forward=0 with a parallel adapter (it reads "
            f"the whole input of the feed-forward network), got {chunk}"
        )
    in_ffn = parts.adapter is not None and parts.adapter.gated
    projections = [name for linear in chosen.values() for name in linear.branches]
    has_gates = parts.lora is not None and bool(parts.lora.gated)
    in_ffn = in_ffn or (has_gates and any("ffn" in name for name in projections))
    if chunk and in_ffn:
        raise ValueError(
            "get_pelt_model: expected chunk_size_feed_forward=0 with a gate in the feed-forward "
            "network (its value is a "
            f"mean over the whole sentence), got {chunk}"
        )


def check_own_attention(
    model: PreTrainedModel,
    stacks: Iterable[Slots],
    parts: Parts,
    chosen: Mapping[int, Chosen],
) -> None:
    """An attention that computes its scores by itself takes no further keys; and where its query
    and key project relative positions, too, those are no sentence that a gate could be a mean of.
    """
    if not any(slots.attention.own_mask for slots in stacks):
        return
    if parts.hyper is not None and parts.hyper.prefix_length:
        raise ValueError(
            "HyperPELTConfig: expected a model whose attention can be given further keys, got "
            f"{type(model).__name__}, which computes its scores with relative positions by itself; "
            "use prefix_length=0, which leaves the adapters"
        )
    if parts.prefix is not None:
        raise ValueError(
            "PrefixTuningConfig: expected a model whose attention can be given further keys, got "
            f"{type(model).__name__}, which computes its scores with relative positions by itself; "
            "leave the prefix out: adapters and LoRA (with gates or without, as in "
            "UniPELTConfig(prefix=None)), AdaMix, PST and BitFit work in it"
        )
    config: Any = model.config
    shares = getattr(config, "share_att_key", False) and getattr(
        config, "relative_attention", False
    )
    if shares and parts.lora is not None and parts.lora.gated:
        projections = {name for linear in chosen.values() for name in linear.branches}
        between = sorted({"query", "key"} & projections)
        if between:
            raise ValueError(
                f"LoraConfig: expected no gate at {' and '.join(between)} of "
                f"{type(model).__name__}, whose query and key project relative positions, too "
                "(share_att_key=True), which belong to no sentence; use targets=('value',), or "
                "gated=False"
            )


def why_padded(model: PreTrainedModel, stacks: Sequence[Slots], parts: Parts) -> str:
    """Why the layers cannot do without padding, as an error says it; empty where they can."""
    reason = ""
    if not stacks or not all(slots.is_by_token for slots in stacks):
        reason = f"{type(model).__name__}, whose layers read positions or masks by themselves"
    elif getattr(model.config, "is_decoder", False):
        reason = f"{type(model).__name__} as a decoder"
    elif getattr(model.config, "chunk_size_feed_forward", 0):
        reason = "chunk_size_feed_forward, which divides sentences of one length"
    elif parts.vlm is not None or parts.hyper is not None:
        reason = "a method whose layers choose weights for each sentence"
    elif any(part.gate_pooling != "masked_mean" for part in parts.gated):
        reason = "gates that do not pool with masked_mean"
    if not reason:
        return ""
    return (
        "expected an encoder of the BERT, DistilBERT or ALBERT kind, with any gates pooled over "
        f"real tokens, got {reason}"
    )


def check_decoder(model: PreTrainedModel, stacks: Sequence[Slots]) -> None:
    """A layer's attention over an encoder has to be known, and a decoder has to be one."""
    config: Any = model.config
    knows_cross = any(attention.site for slots in stacks for attention in slots.attentions)
    if getattr(config, "add_cross_attention", False) and not knows_cross:
        raise ValueError(
            "get_pelt_model: expected a model that reads only its own text, got "
            f"{type(model).__name__} with add_cross_attention=True in its config"
        )
    if not getattr(config, "is_causal", True) and stacks[-1].is_causal:
        raise ValueError(
            "get_pelt_model: expected a decoder whose tokens see no later ones, got "
            f"{type(model).__name__} with is_causal=False in its config"
        )
