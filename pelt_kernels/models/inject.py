"""Putting a method's parts into a model, and taking them out again. What they do there is in
`layer.py`, what stands for what in `replacement.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..methods import Parts, PrefixTuningConfig
from ..nn import PrefixAttention
from .attention_config import with_pelt_attention
from .encoder_hooks import (
    FIRST_LAYER_ATTRIBUTE,
    FORWARDS_ATTRIBUTE,
    Forwards,
    begin_forward,
    end_forward,
    start_gradient,
)
from .layer import (
    PREFIX_ATTRIBUTE,
    STATE_ATTRIBUTE,
    LayerPrefix,
    LayerState,
    hooks_of,
    read_mask,
)
from .replacement import Replacement, StandIns, check_places
from .slots import embeddings_of, layers_of, slots_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Injection:
    """The parts of a method inside one model. `attach` puts them in, `detach` takes them out; both
    may be repeated.

    Attributes:
        prefix: the prefixes of all layers, or None.
        states: what is known about each layer.
        replacements: which modules of the base model give way to which.
    """

    def __init__(self, model: PreTrainedModel, parts: Parts) -> None:
        self.model, self.parts = model, parts
        self.slots = slots = slots_of(model)
        self.layers = layers_of(model, slots)
        self.embeddings = embeddings_of(model, slots)
        self._check()
        self._handles: list[Any] = []
        self._marked: list[tuple[nn.Module, str]] = []
        placement = _parameter_placement(self.layers[0].get_submodule(slots.linear("query")))
        self.prefix, rows = _make_prefix(model, len(self.layers), parts.prefix, placement)
        self.needs_mask = any(part.gate_pooling == "masked_mean" for part in parts.gated)
        self.uses_pelt_attention = self.needs_mask or self.prefix is not None
        self.base_config = model.config
        self.pelt_config = (
            with_pelt_attention(model.config) if self.uses_pelt_attention else model.config
        )
        self.states = [LayerState(i, self.needs_mask) for i in range(len(self.layers))]
        self.prefixes = [self._prefix_of(rows.get(i)) for i in range(len(self.layers))]
        self.replacements: list[Replacement] = []
        stand_ins = StandIns(slots, parts, placement)
        for layer, state, prefix in zip(self.layers, self.states, self.prefixes, strict=True):
            self.replacements += stand_ins.in_layer(layer, state, prefix)

    def _check(self) -> None:
        """Raises ValueError for a model that the parts cannot be put into."""
        if FIRST_LAYER_ATTRIBUTE in self.embeddings.__dict__:
            raise_occupied()
        check_places(self.model, self.layers, self.slots, self.parts)
        _check_decoder(self.model, self.parts)
        _check_chunking(self.model, self.parts)

    def _prefix_of(self, row: int | None) -> LayerPrefix | None:
        if row is None or self.prefix is None or self.parts.prefix is None:
            return None
        return LayerPrefix(self.prefix, row, bool(self.parts.prefix.gated))

    def attach(self) -> None:
        """Puts the parts in: modules, the attention's name, the hooks of each layer."""
        if self.uses_pelt_attention or self.parts.has_parallel_adapter:
            encoder = self.model.base_model
            self._mark(encoder, FORWARDS_ATTRIBUTE, Forwards(self.states))
            self._handles.append(encoder.register_forward_pre_hook(begin_forward))
            self._handles.append(encoder.register_forward_hook(end_forward, always_call=True))
        for replacement in self.replacements:
            replacement.put_in()
        if self.uses_pelt_attention:
            self._use_config(self.base_config, self.pelt_config)
        for layer, state, prefix in zip(self.layers, self.states, self.prefixes, strict=True):
            self._attach_layer(layer, state, prefix)
        self._mark(self.embeddings, FIRST_LAYER_ATTRIBUTE, self.layers[0])
        self._handles.append(self.embeddings.register_forward_hook(start_gradient))

    def _attach_layer(
        self, layer: nn.Module, state: LayerState, prefix: LayerPrefix | None
    ) -> None:
        if prefix is not None:
            attention = layer.get_submodule(self.slots.attention.module)
            self._mark(attention, PREFIX_ATTRIBUTE, prefix)
        hooks = hooks_of(self.slots, self.parts, self.uses_pelt_attention, self.needs_mask)
        for path, hook in hooks:
            module = layer.get_submodule(path)
            self._mark(module, STATE_ATTRIBUTE, state)
            takes_kwargs = hook is read_mask
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=takes_kwargs))

    def _mark(self, module: nn.Module, name: str, value: Any) -> None:
        """Leaves a note on a module of the base model. One that is a module itself would be
        registered as its child by setattr; a note is no ownership.
        """
        object.__setattr__(module, name, value)
        self._marked.append((module, name))

    def check_detachable(self, who: str) -> None:
        """Raises ValueError where `detach` would not leave the base model."""
        for replacement in self.replacements:
            replacement.check_removable(who)

    def detach(self) -> None:
        """Takes the parts out: the model has its own modules, configuration and attention."""
        for handle in self._handles:
            handle.remove()
        for module, name in self._marked:
            module.__dict__.pop(name, None)
        self._handles, self._marked = [], []
        for replacement in self.replacements:
            replacement.take_out()
        if self.uses_pelt_attention:
            self._use_config(self.pelt_config, self.base_config)

    def _use_config(self, old: Any, new: Any) -> None:
        """The attention implementation is read from the configuration that the encoder's modules
        share; they are given a view of it, because another model may have been built from it.
        """
        for module in self.model.base_model.modules():
            if getattr(module, "config", None) is old:
                module.config = new


def raise_occupied() -> None:
    """The one answer to a second method in the same model."""
    raise ValueError(
        "get_pelt_model: expected a plain model, got one that has a method in it; remove() it first"
    )


def _make_prefix(
    model: PreTrainedModel,
    num_layers: int,
    config: PrefixTuningConfig | None,
    placement: dict[str, Any],
) -> tuple[PrefixAttention | None, dict[int, int]]:
    """The prefixes, and which row of them belongs to which layer."""
    if config is None:
        return None, {}
    beyond = [layer for layer in config.skip_layers if layer >= num_layers]
    layers = [layer for layer in range(num_layers) if layer not in config.skip_layers]
    if beyond or not layers:
        raise ValueError(
            f"PrefixTuningConfig: expected skip_layers to leave some of the model's {num_layers} "
            "layers (0 to "
            f"{num_layers - 1}), got {list(config.skip_layers)}"
        )
    heads = model.config.num_attention_heads
    prefix = PrefixAttention(
        len(layers),
        config.prefix_length,
        heads,
        model.config.hidden_size // heads,
        mid=config.mid,
        **placement,
    )
    return prefix, {layer: row for row, layer in enumerate(layers)}


def _parameter_placement(linear: nn.Module) -> dict[str, Any]:
    """Where new parameters live; float32 beside 16-bit weights, which would lose small updates."""
    weight = linear.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise ValueError(
            "get_pelt_model: expected a model with floating-point weights, got "
            f"{type(linear).__name__} with "
            f"{getattr(weight, 'dtype', type(weight).__name__)}"
        )
    is_sixteen_bit = weight.dtype in (torch.float16, torch.bfloat16)
    return {"device": weight.device, "dtype": torch.float32 if is_sixteen_bit else weight.dtype}


def _check_chunking(model: PreTrainedModel, parts: Parts) -> None:
    """A gate is a mean over a sentence's rows; an FFN that sees slices of it cannot make it."""
    chunk = getattr(model.config, "chunk_size_feed_forward", 0)
    if chunk and parts.has_parallel_adapter:
        raise ValueError(
            "get_pelt_model: expected chunk_size_feed_forward=0 with a parallel adapter (it reads "
            f"the whole input of the feed-forward network), got {chunk}"
        )
    in_ffn = parts.adapter is not None and parts.adapter.gated
    in_ffn = in_ffn or (
        parts.lora is not None and parts.lora.gated and any("ffn" in t for t in parts.lora.targets)
    )
    if chunk and in_ffn:
        raise ValueError(
            "get_pelt_model: expected chunk_size_feed_forward=0 with a gate in the feed-forward "
            "network (its value is a "
            f"mean over the whole sentence), got {chunk}"
        )


def _check_decoder(model: PreTrainedModel, parts: Parts) -> None:
    """A decoder writes word by word, and what it wrote must not change with what follows."""
    if not getattr(model.config, "is_decoder", False):
        return
    if getattr(model.config, "add_cross_attention", False):
        raise ValueError(
            "get_pelt_model: expected a model that reads only its own text, got "
            f"{type(model).__name__} with add_cross_attention=True in its config"
        )
    gated = [part.method for part in parts.gated]
    if gated:
        raise ValueError(
            "get_pelt_model: expected parts without gates in a decoder, got "
            f"{type(model).__name__} with a gate on {', '.join(gated)}, which is a mean over the "
            "whole sentence, later words included; use gated=False"
        )
