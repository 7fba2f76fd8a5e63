"""Putting a method's parts into a model, and taking them out again. What they do there is in
`layer.py`, what stands for what in `replacement.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..methods import ControlPrefixesConfig, Parts, PrefixTuningConfig
from ..methods.control_prefixes import SITES
from ..nn import PrefixAttention
from ..nn.original import sizes_of
from . import attention as _attention  # noqa: F401  # makes "pelt" known to transformers
from .attention_config import with_pelt_attention
from .call import Call, carry_no_more
from .encoder_hooks import (
    FORWARDS_ATTRIBUTE,
    STACK_ATTRIBUTE,
    Forwards,
    StackNotes,
    begin_forward,
    end_forward,
    start_gradient,
)
from .layer import hooks_of
from .layer_state import PREFIX_ATTRIBUTE, STATE_ATTRIBUTE, LayerPrefix, LayerState
from .replacement import Replacement, StandIns, check_places
from .slots import AttentionSlots, Place, Slots, embeddings_of, layers_of, stacks_of

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
            LayerState(first_number + i, self.needs_mask, call) for i in range(len(self.layers))
        ]
        self.prefixes: list[dict[str, LayerPrefix]] = [{} for _ in self.layers]

    def sites(self) -> Iterator[tuple[str, AttentionSlots]]:
        """The attentions of a layer by what they attend from and to: ``encoder``, ``decoder`` and
        ``cross``.
        """
        for attention in self.slots.attentions:
            yield attention.site or self.slots.name, attention


class Injection:
    """The parts of a method inside one model. `attach` puts them in, `detach` takes them out; both
    may be repeated.

    Attributes:
        prefix: the prefixes: of all layers (`PrefixAttention`), or, in a model with several kinds
            of attention, of each kind by name (``encoder``, ``decoder``, ``cross``); or None.
        stacks: the model's, an encoder before a decoder.
        states: what is known about each layer of all stacks.
        replacements: which modules of the base model give way to which.
        call: what a call of the model gives its layers.
    """

    def __init__(self, model: PreTrainedModel, parts: Parts) -> None:
        self.model, self.parts = model, parts
        self.call = Call()
        self.stacks: list[Stack] = []
        for slots in stacks_of(model):
            number = sum(len(stack.layers) for stack in self.stacks)
            self.stacks.append(Stack(model, slots, parts, number, self.call))
        self.states = [state for stack in self.stacks for state in stack.states]
        self._check()
        self._handles: list[Any] = []
        self._marked: list[tuple[nn.Module, str]] = []
        first = self.stacks[0]
        query = first.slots.places("query")[0][1].path
        placement = _parameter_placement(first.layers[0].get_submodule(query))
        self.prefix = _make_prefixes(model, self.stacks, parts.prefix, placement)
        self.uses_pelt_attention = self.prefix is not None or any(
            stack.needs_mask and not stack.slots.attention.own_mask for stack in self.stacks
        )
        self._views = self._make_views()
        self.replacements: list[Replacement] = []
        for stack in self.stacks:
            stand_ins = StandIns(stack.slots, parts, placement, stack.is_causal)
            for layer, state, prefixes in zip(
                stack.layers, stack.states, stack.prefixes, strict=True
            ):
                own = prefixes.get(stack.slots.attention.module)
                has_pooled_gate = own is not None and own.gate == "pooled"
                self.replacements += stand_ins.in_layer(layer, state, has_pooled_gate)

    def _check(self) -> None:
        """Raises ValueError for a model that the parts cannot be put into."""
        for stack in self.stacks:
            if STACK_ATTRIBUTE in stack.embeddings.__dict__:
                raise_occupied()
            check_places(self.model, stack.layers, stack.slots, self.parts)
        _check_decoder(self.model, self.stacks)
        _check_own_attention(self.model, self.stacks, self.parts)
        _check_chunking(self.model, self.parts)

    def attach(self) -> None:
        """Puts the parts in: modules, the attention's name, the hooks of each layer."""
        needs_mask = any(stack.needs_mask for stack in self.stacks)
        if self.uses_pelt_attention or needs_mask or self.parts.has_parallel_adapter:
            encoder = self.model.base_model
            self._mark(encoder, FORWARDS_ATTRIBUTE, Forwards(self.states))
            self._handles.append(encoder.register_forward_pre_hook(begin_forward))
            self._handles.append(encoder.register_forward_hook(end_forward, always_call=True))
        for replacement in self.replacements:
            replacement.put_in()
        if self.uses_pelt_attention:
            self._use_configs({id(base): view for base, view in self._views})
        for stack in self.stacks:
            self._attach_stack(stack)

    def _attach_stack(self, stack: Stack) -> None:
        for layer, state, prefixes in zip(stack.layers, stack.states, stack.prefixes, strict=True):
            for path, prefix in prefixes.items():
                attention = layer.get_submodule(path)
                self._mark(attention, PREFIX_ATTRIBUTE, prefix)
                self._mark(attention, STATE_ATTRIBUTE, state)
            uses_mask = self.uses_pelt_attention
            for hook in hooks_of(stack.slots, self.parts, uses_mask, stack.needs_mask):
                module = layer.get_submodule(hook.path)
                self._mark(module, STATE_ATTRIBUTE, state)
                register = (
                    module.register_forward_hook
                    if hook.is_after
                    else module.register_forward_pre_hook
                )
                self._handles.append(register(hook.call, with_kwargs=hook.takes_kwargs))
        notes = StackNotes(stack.layers, self.call)
        self._mark(stack.embeddings, STACK_ATTRIBUTE, notes)
        self._handles.append(stack.embeddings.register_forward_hook(start_gradient))

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
        for stack in self.stacks:
            carry_no_more(stack.layers)
        for replacement in self.replacements:
            replacement.take_out()
        if self.uses_pelt_attention:
            self._use_configs({id(view): base for base, view in self._views})

    def _make_views(self) -> list[tuple[Any, Any]]:
        """The configurations in the model that name the attention, each with a view of it that
        names "pelt": the modules of a stack share one.
        """
        if not self.uses_pelt_attention:
            return []
        found = {}
        for module in self.model.base_model.modules():
            config = getattr(module, "config", None)
            if hasattr(config, "_attn_implementation"):
                found[id(config)] = config
        return [(config, with_pelt_attention(config)) for config in found.values()]

    @contextmanager
    def shown_to_generate(self) -> Iterator[None]:
        """Inside, the model itself, whose generate() makes the masks for a cache of fixed size, is
        seen with "pelt" attention, too.
        """
        base = self.model.config
        for config, view in self._views if self._handles else ():
            if config is base:
                self.model.config = view
        try:
            yield
        finally:
            self.model.config = base

    def _use_configs(self, instead: dict[int, Any]) -> None:
        """The attention implementation is read from the configuration that a stack's modules share;
        they are given a view of it, because another model may have been built from it.
        """
        for module in self.model.base_model.modules():
            config = getattr(module, "config", None)
            if id(config) in instead:
                module.config = instead[id(config)]


def raise_occupied() -> None:
    """The one answer to a second method in the same model."""
    raise ValueError(
        "get_pelt_model: expected a plain model, got one that has a method in it; remove() it first"
    )


def _make_prefixes(
    model: PreTrainedModel,
    stacks: list[Stack],
    config: PrefixTuningConfig | None,
    placement: dict[str, Any],
) -> PrefixAttention | nn.ModuleDict | None:
    """A set of prefixes for each kind of attention; and tells each stack which row is whose."""
    if config is None:
        return None
    count = sum(len(stack.layers) for stack in stacks)
    beyond = [layer for layer in config.skip_layers if layer >= count]
    sets: dict[str, PrefixAttention] = {}
    for stack in stacks:
        numbers = [state.number for state in stack.states]
        for site, attention in stack.sites():
            rows = [n for n in numbers if not config.skips(site, n, n - numbers[0])]
            if not rows:
                continue
            heads, head_size = _key_heads(model, stack.layers[0], attention)
            gate = None
            if config.gated:
                gate = "number" if stack.is_causal else "pooled"
            sets[site] = PrefixAttention(
                len(rows),
                config.prefix_length,
                heads,
                head_size,
                mid=config.mid,
                width=model.config.hidden_size,
                has_gates=gate == "number",
                **_attributes(config),
                **placement,
            )
            kind = f"{attention.site}_prefix" if attention.site else "prefix"
            is_cross = bool(attention.site)
            for row, number in enumerate(rows):
                own = LayerPrefix(sets[site], row, gate, kind, is_cross)
                stack.prefixes[number - numbers[0]][attention.module] = own
    if beyond or not sets:
        raise ValueError(
            f"PrefixTuningConfig: expected skip_layers to leave some of the model's {count} "
            f"layers (0 to {count - 1}), got {list(config.skip_layers)}"
        )
    _check_sites(model, stacks, config)
    has_one = sum(len(stack.slots.attentions) for stack in stacks) == 1
    return next(iter(sets.values())) if has_one else nn.ModuleDict(sets)


def _check_sites(model: PreTrainedModel, stacks: list[Stack], config: PrefixTuningConfig) -> None:
    """Raises ValueError for control prefixes that leave out an attention that is not there."""
    if not isinstance(config, ControlPrefixesConfig):
        return
    counts = {site: len(stack.layers) for stack in stacks for site, _ in stack.sites()}
    for site in SITES:
        skipped = getattr(config, f"skip_{site}")
        count = counts.get(site, 0)
        if any(layer >= count for layer in skipped):
            raise ValueError(
                f"ControlPrefixesConfig: expected skip_{site} among the layers 0 to {count - 1} of "
                f"{type(model).__name__}, got {list(skipped)}"
                if count
                else f"ControlPrefixesConfig: expected skip_{site} to be empty, as "
                f"{type(model).__name__} has no such attention, got {list(skipped)}"
            )


def _attributes(config: PrefixTuningConfig) -> dict[str, Any]:
    """What `PrefixAttention` is told of control prefixes."""
    if not isinstance(config, ControlPrefixesConfig):
        return {}
    return {
        "attributes": config.tables(),
        "unseen": config.unseen_labels(),
        "start": config.start,
    }


def _key_heads(
    model: PreTrainedModel, layer: nn.Module, attention: AttentionSlots
) -> tuple[int, int]:
    """How many heads the keys of an attention have, and their size."""
    module = layer.get_submodule(attention.module)
    head_size = model.config.hidden_size // model.config.num_attention_heads
    for name in ("head_dim", "attention_head_size", "key_value_proj_dim"):
        head_size = getattr(module, name, head_size)
    place = attention.key if isinstance(attention.key, Place) else Place(attention.key)
    columns = sizes_of(layer.get_submodule(place.path))[1] // place.parts
    return columns // head_size, head_size


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


def _check_own_attention(model: PreTrainedModel, stacks: list[Stack], parts: Parts) -> None:
    """An attention that computes its scores by itself takes no further keys; and where its query
    and key project relative positions, too, those are no sentence that a gate could be a mean of.
    """
    if not any(stack.slots.attention.own_mask for stack in stacks):
        return
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
        between = sorted({"query", "key"} & set(parts.lora.targets))
        if between:
            raise ValueError(
                f"LoraConfig: expected no gate at {' and '.join(between)} of "
                f"{type(model).__name__}, whose query and key project relative positions, too "
                "(share_att_key=True), which belong to no sentence; use targets=('value',), or "
                "gated=False"
            )


def _check_decoder(model: PreTrainedModel, stacks: list[Stack]) -> None:
    """A layer's attention over an encoder has to be known, and a decoder has to be one."""
    config: Any = model.config
    knows_cross = any(attention.site for stack in stacks for attention in stack.slots.attentions)
    if getattr(config, "add_cross_attention", False) and not knows_cross:
        raise ValueError(
            "get_pelt_model: expected a model that reads only its own text, got "
            f"{type(model).__name__} with add_cross_attention=True in its config"
        )
    if not getattr(config, "is_causal", True) and stacks[-1].slots.is_causal:
        raise ValueError(
            "get_pelt_model: expected a decoder whose tokens see no later ones, got "
            f"{type(model).__name__} with is_causal=False in its config"
        )
