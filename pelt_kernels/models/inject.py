"""Putting a method's parts into a model, and taking them out again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..methods import Parts, PrefixTuningConfig
from ..methods.lora import TARGETS
from ..nn import GatedAdapter, LoRALinear, PrefixAttention
from ..nn.original import Original
from .attention import (
    FORWARDS,
    SITE,
    Forwards,
    LayerSite,
    begin_forward,
    end_forward,
    forget_mask,
    keep_ffn_input,
    read_mask,
    register_attention,
)
from .attention_config import with_pelt_attention
from .mixture import adapt_with_experts, check_random_state
from .pruning import prune_linears
from .replacement import Replacement, check_places
from .slots import Slots, embeddings_of, layers_of, place_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX_GATE = "prefix"
FIRST_LAYER = "_pelt_first_layer"


class AdaptedLinear(LoRALinear):
    """A `LoRALinear` in a model: it reads the layer's mask and leaves its gates with the layer."""

    def __init__(
        self, base: nn.Linear, *args: Any, site: LayerSite, target: str, **kwargs: Any
    ) -> None:
        super().__init__(base, *args, **kwargs)
        self.site, self.target = site, target

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """y [B, S, Dout], as the Linear it stands for."""
        y, values = super().forward(x, self.site.in_flight.mask)
        if PREFIX_GATE in values:
            self.site.in_flight.prefix_gate = values[PREFIX_GATE]
            self.site.record("prefix", values[PREFIX_GATE])
        if "" in values:
            self.site.record(f"lora_{self.target}", values[""])
        return y


class AdaptedNorm(nn.Module):
    """``out = LN( g·u + s )`` with u the adapter of ``z = LN(s)``: the layer's frozen LayerNorm,
    used twice. With ``is_parallel`` u is the adapter of the FFN's input, which `keep_ffn_input`
    left with the layer.

    s [B, S, D] is the FFN's output plus its residual, which is what the LayerNorm it stands for is
    given. weight and bias are the LayerNorm's own parameters under the same names. Hooks of the
    LayerNorm fire once in a forward, for the layer's output: they see ``g·u + s`` and out.
    """

    def __init__(
        self, base: nn.LayerNorm, adapter: GatedAdapter, site: LayerSite, is_parallel: bool
    ) -> None:
        super().__init__()
        self.original = Original(base, nn.LayerNorm)
        self.normalized_shape, self.eps = base.normalized_shape, base.eps
        self.weight, self.bias = base.weight, base.bias
        self.adapter = adapter
        self.site, self.is_parallel = site, is_parallel

    def forward(self, s: Tensor) -> Tensor:
        """out [B, S, D]."""
        mask = self.site.in_flight.mask
        self.site.in_flight.mask = None
        read = self.site.in_flight.ffn_input if self.is_parallel else self._norm(s)
        self.site.in_flight.ffn_input = None
        is_gated = self.adapter.gate is not None
        y, gate = self.adapter(read, residual=s, mask=mask if is_gated else None, return_gate=True)
        if is_gated:
            self.site.record("adapter", gate)
        return self._norm(y) if self.original.is_plain else self.original(self, y)

    def _norm(self, s: Tensor) -> Tensor:
        if self.original.has_own_forward:
            return self.original.without_hooks(self, s)
        return nn.functional.layer_norm(s, self.normalized_shape, self.weight, self.bias, self.eps)


class Injection:
    """The parts of a method inside one model. `attach` puts them in, `detach` takes them out; both
    may be repeated.

    Attributes:
        prefix: the prefixes of all layers, or None.
        sites: what hangs on each layer's attention module.
    """

    def __init__(self, model: PreTrainedModel, slots: Slots, parts: Parts) -> None:
        self.model, self.parts = model, parts
        self.layers = layers_of(model, slots)
        self.embeddings = embeddings_of(model, slots)
        if FIRST_LAYER in self.embeddings.__dict__:
            raise_occupied()
        check_places(model, self.layers, slots, parts)
        _check_decoder(model, parts)
        _check_chunking(model, parts)
        self.made = _parameter_placement(self.layers[0].get_submodule(slots.query))
        self.prefix, rows = _make_prefix(model, len(self.layers), parts.prefix, self.made)
        self.sites: list[LayerSite] = []
        self.replacements: list[Replacement] = []
        self._attentions: list[nn.Module] = []
        self._last_norms: list[nn.Module] = []
        self._is_parallel = parts.adapter is not None and parts.adapter.placement == "parallel"
        self._ffn_path = slots.ffn_in
        self._handles: list[Any] = []
        self.base_config = model.config
        needs_mask = any(part.gate_pooling == "masked_mean" for part in parts.gated)
        self.uses_pelt_attention = needs_mask or self.prefix is not None
        self.pelt_config = (
            with_pelt_attention(model.config) if self.uses_pelt_attention else model.config
        )
        for i, layer in enumerate(self.layers):
            has_prefix = i in rows
            site = LayerSite(
                layer=i,
                prefix=self.prefix if has_prefix else None,
                prefix_row=rows.get(i, -1),
                has_prefix_gate=has_prefix and bool(parts.prefix and parts.prefix.gated),
                needs_mask=needs_mask,
            )
            self.sites.append(site)
            self._attentions.append(layer.get_submodule(slots.attention))
            self._last_norms.append(layer.get_submodule(slots.ffn_norm))
            self.replacements.extend(self._adapt(layer, slots, site))
            if parts.pruning is not None:
                self.replacements += prune_linears(layer, slots, parts.pruning, self.made)
            if parts.mixture is not None:
                self.replacements += adapt_with_experts(layer, slots, parts.mixture, self.made)

    def _adapt(self, layer: nn.Module, slots: Slots, site: LayerSite) -> Iterator[Replacement]:
        """The modules that stand for a layer's own; the query's Linear also for a prefix's gate."""
        lora, prefix, adapter = self.parts.lora, self.parts.prefix, self.parts.adapter
        for target in TARGETS:
            has_branch = lora is not None and target in lora.targets
            extra = (
                {PREFIX_GATE: prefix.gate_pooling}
                if prefix and target == "query" and site.has_prefix_gate
                else {}
            )
            if not has_branch and not extra:
                continue
            parent, name = place_of(layer, getattr(slots, target))
            original = getattr(parent, name)
            adapted = AdaptedLinear(
                original,
                lora.r if lora and has_branch else 0,
                lora.alpha if lora else 1.0,
                dropout=lora.dropout if lora else 0.0,
                gate_pooling=lora.gate_pooling if lora and lora.gated else None,
                extra_gates=extra,
                dtype=self.made["dtype"],
                site=site,
                target=target,
            )
            yield Replacement(parent, name, original, adapted)
        if adapter is not None:
            parent, name = place_of(layer, slots.ffn_norm)
            original = getattr(parent, name)
            hidden_size = original.normalized_shape[0]
            module = GatedAdapter(
                hidden_size,
                adapter.bottleneck_of(hidden_size),
                activation=adapter.activation,
                gate_pooling=adapter.gate_pooling if adapter.gated else None,
                dropout=adapter.dropout,
                scale=adapter.scale,
                start=adapter.start,
                **self.made,
            )
            adapted_norm = AdaptedNorm(original, module, site, self._is_parallel)
            yield Replacement(parent, name, original, adapted_norm)

    def attach(self) -> None:
        """Puts the parts in: modules, the attention function, hooks that read a layer's mask."""
        if self.uses_pelt_attention or self._is_parallel:
            encoder = self.model.base_model
            setattr(encoder, FORWARDS, Forwards(self.sites))
            self._handles.append(encoder.register_forward_pre_hook(begin_forward))
            self._handles.append(encoder.register_forward_hook(end_forward, always_call=True))
        for place in self.replacements:
            place.adapted.train(place.original.training)
            setattr(place.parent, place.name, place.adapted)
        if self._is_parallel:
            for ffn, site in zip(self._ffns(), self.sites, strict=True):
                setattr(ffn, SITE, site)
                self._handles.append(ffn.register_forward_pre_hook(keep_ffn_input))
        if self.uses_pelt_attention:
            register_attention()
            self._use_config(self.base_config, self.pelt_config)
            for attention, norm, site in zip(self._attentions, self._last_norms, self.sites):
                setattr(attention, SITE, site)
                self._handles.append(
                    attention.register_forward_pre_hook(read_mask, with_kwargs=True)
                )
                if self.parts.adapter is None and site.needs_mask:
                    setattr(norm, SITE, site)
                    self._handles.append(norm.register_forward_pre_hook(forget_mask))
        if self.parts.mixture is not None:
            for layer in self.layers:
                self._handles.append(layer.register_forward_pre_hook(check_random_state))
        # A module attribute would be registered as a submodule; this is a note, not ownership.
        object.__setattr__(self.embeddings, FIRST_LAYER, self.layers[0])
        self._handles.append(self.embeddings.register_forward_hook(start_gradient))

    def _ffns(self) -> list[nn.Module]:
        """The first Linear of each layer's FFN, or what stands for it now."""
        return [layer.get_submodule(self._ffn_path) for layer in self.layers]

    def check_detachable(self, who: str) -> None:
        """Raises ValueError where `detach` would not leave the base model."""
        for place in self.replacements:
            place.check_removable(who)

    def detach(self) -> None:
        """Takes the parts out: the model has its own modules, configuration and attention."""
        for ffn in self._ffns():
            ffn.__dict__.pop(SITE, None)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for place in self.replacements:
            # `to_empty` replaces Parameters; the original follows what stood for it.
            for name in ("weight", "bias"):
                place.original.register_parameter(name, getattr(place.adapted, name))
            place.original.train(place.adapted.training)
            setattr(place.parent, place.name, place.original)
        if self.uses_pelt_attention:
            self._use_config(self.pelt_config, self.base_config)
            for module in (*self._attentions, *self._last_norms):
                module.__dict__.pop(SITE, None)
        self.embeddings.__dict__.pop(FIRST_LAYER, None)
        self.model.base_model.__dict__.pop(FORWARDS, None)

    def _use_config(self, old: Any, new: Any) -> None:
        """The attention implementation is read from the configuration that the encoder's modules
        share; they are given a view of it, because another model may have been built from it.
        """
        for module in self.model.base_model.modules():
            if getattr(module, "config", None) is old:
                module.config = new


def start_gradient(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook of the embeddings. Reentrant checkpointing passes no gradient to the parameters
    of a layer none of whose inputs requires one, and the output of frozen embeddings does not.
    """
    first: nn.Module = getattr(module, FIRST_LAYER)
    is_checkpointed = getattr(first, "gradient_checkpointing", False) and first.training
    if is_checkpointed and torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)
    return output


def raise_occupied() -> None:
    """The one answer to a second method in the same model."""
    raise ValueError(
        "get_pelt_model: expected a plain model, got one that has a method in it; remove() it first"
    )


def _make_prefix(
    model: PreTrainedModel, num_layers: int, config: PrefixTuningConfig | None, made: dict[str, Any]
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
        **made,
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
    if chunk and parts.adapter is not None and parts.adapter.placement == "parallel":
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
