"""Prefix tuning as PEFT's files have it: what stands in the cache of a decoder, for all layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...methods import ControlPrefixesConfig, PrefixTuningConfig
from ..prefix_sets import key_heads
from ..slots import FAMILIES, layers_of, stacks_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The sizes are those of the tensor; the projection is in it, computed.
PREFIX_FIELDS = (
    "num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads",
    "num_layers", "encoder_hidden_size", "prefix_projection", "init_weights",
)  # fmt: skip
TENSOR = "prompt_embeddings"
OWN_NAME = "prefix.table"


def read_prefix(
    described: Mapping[str, Any], tensors: dict[str, Tensor], base: PreTrainedModel, where: str
) -> tuple[PrefixTuningConfig, dict[str, Tensor]]:
    """The config and the table [L, 2, P, G, E], whose tensor it takes out of the tensors."""
    reason = why_no_prefix(base)
    if reason:
        raise ValueError(f"from_pretrained: {where} cannot be read, as {reason}")
    layers, heads, size = _sizes(base)
    table = tensors.pop(TENSOR, None)
    width = layers * 2 * heads * size
    if table is None or table.ndim != 2 or table.shape[1] != width:
        raise ValueError(
            f"from_pretrained: expected {TENSOR} [P, {width}] of {layers} layers with {heads} "
            f"heads of {size}, got {'none' if table is None else list(table.shape)} in {where}"
        )
    by_layer = table.view(-1, layers, 2, heads, size).permute(1, 2, 0, 3, 4).contiguous()
    config = PrefixTuningConfig(prefix_length=len(table), mid=None, shift_positions=True)
    return config, {OWN_NAME: by_layer}


def written_prefix(
    config: PrefixTuningConfig, tensors: Mapping[str, Tensor], base: PreTrainedModel
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's fields and tensor of a collapsed prefix."""
    layers, heads, size = _sizes(base)
    table = tensors[OWN_NAME].detach().permute(2, 0, 1, 3, 4)
    fields = {
        "num_virtual_tokens": len(table),
        "token_dim": heads * size,
        "num_transformer_submodules": 1,
        "num_attention_heads": heads,
        "num_layers": layers,
        "encoder_hidden_size": heads * size,
        "prefix_projection": False,
    }
    return fields, {TENSOR: table.reshape(len(table), -1)}


def why_not_written(config: PrefixTuningConfig, base: PreTrainedModel) -> str:
    """Why PEFT has nothing like a method's prefix, or nothing."""
    if config.gated:
        return "a gated prefix, and its prefixes have no gates"
    if isinstance(config, ControlPrefixesConfig):
        return "prefixes of attributes"
    if config.skip_layers:
        return f"skip_layers={config.skip_layers}, and it has a prefix in every layer"
    reason = why_no_prefix(base)
    if not reason and not config.shift_positions:
        reason = (
            "a prefix beside which tokens keep their positions, and its tokens stand behind the "
            "prefix; PrefixTuningConfig(shift_positions=True) trains one so"
        )
    return reason


def why_no_prefix(base: PreTrainedModel) -> str:
    """Why PEFT's prefix and this package's cannot be the same in a model, or nothing."""
    name, config = type(base).__name__, base.config
    if config.model_type not in FAMILIES:
        return f"{name} is of no family that takes prefixes here"
    stacks = stacks_of(base)
    is_decoder = stacks[-1].is_causal or bool(getattr(config, "is_decoder", False))
    if len(stacks) > 1:
        return (
            f"in {name}, an encoder-decoder, PEFT's prefix counts in the positions of the decoder "
            "alone, which a prefix here leaves as they are"
        )
    if not is_decoder:
        return f"{name} is no decoder, and PEFT has prefixes in a decoder's cache only"
    windows = [kind for kind in getattr(config, "layer_types", None) or () if "sliding" in kind]
    if windows or (not hasattr(config, "layer_types") and getattr(config, "sliding_window", None)):
        return f"PEFT's prefix leaves the sliding window of {name}, which never hides one here"
    return ""


def _sizes(base: PreTrainedModel) -> tuple[int, int, int]:
    """L, G and E."""
    (slots,) = stacks_of(base)
    layers = layers_of(base, slots)
    return len(layers), *key_heads(base, layers[0], slots.attention)
