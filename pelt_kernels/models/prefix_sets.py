"""The sets of prefixes of a model, one for each kind of attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from ..methods import ControlPrefixesConfig, PrefixTuningConfig
from ..methods.control_prefixes import SITES
from ..nn import PrefixAttention
from ..nn.original import sizes_of
from .layer_state import LayerPrefix
from .slots import AttentionSlots, Place

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .stack import Stack


def make_prefixes(
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
            heads, head_size = key_heads(model, stack.layers[0], attention)
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


def key_heads(
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
