"""The tensors of the library ``adapters`` by the names that they have here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ..slots import layers_of, stacks_of
from ..wrapped import BASE
from .adapterhub_config import Parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Family(NamedTuple):
    """Where the library keeps what has no module of its own in a base model.

    Attributes:
        bottleneck: the module with the adapters, in a layer.
        prefix: the kind of attention by which its prefixes go.
    """

    bottleneck: str = "output"
    prefix: str = "self_prefix"


FAMILIES = {
    "bert": Family(),
    "distilbert": Family("output_adapters", "self"),
    "electra": Family(),
    "roberta": Family(),
    "xlm-roberta": Family(),
}


def adapter_tensors(
    parts: Parts,
    tensors: dict[str, Tensor],
    name: str,
    base: PreTrainedModel,
    family: Family,
    file: Path,
) -> tuple[dict[str, Tensor], Parts]:
    """The tensors of the parts by their names here, and the parts as the tensors have them: a
    prefix that was ejected is a table, whatever its config says.

    Raises:
        ValueError: a key that the parts ask for and the file has not, or the other way round.
    """
    start = f"{base.base_model_prefix}." if base.base_model is not base else ""
    # A model with a head names its encoder in its keys, a bare one does not.
    left = {key.removeprefix(f"{base.base_model_prefix}."): t for key, t in tensors.items()}
    # Each layer shows the set of prefixes of the whole model once more.
    shown = f".prefix_tuning.pool.prefix_tunings.{name}."
    left = {key: tensor for key, tensor in left.items() if shown not in key}
    found = {}
    for theirs, ours in _pairs(parts, name, base, family):
        found[f"{BASE}{start}{ours}"] = _taken(left, theirs, file)
        if ours.endswith("gate.weight") or ".extra_gates." in ours:
            found[f"{BASE}{start}{ours}"] = found[f"{BASE}{start}{ours}"].flatten()
    if parts.prefix is not None:
        key = f"prefix_tuning.prefix_tunings.{name}.{family.prefix}."
        prefix, mid = _prefix(parts, left, key, base, file)
        parts = parts._replace(prefix=replace(parts.prefix, mid=mid))
        found |= prefix
    if left:
        raise ValueError(
            "from_pretrained: expected no tensor but those of its config, got "
            f"{min(left)} and {len(left) - 1} more in {file}"
        )
    return found, parts


def _pairs(
    parts: Parts, name: str, base: PreTrainedModel, family: Family
) -> Iterator[tuple[str, str]]:
    """Their names and ours, both below the encoder."""
    (slots,) = stacks_of(base)
    count = len(layers_of(base, slots))
    attention, query = slots.attention.module, slots.places("query")[0][1].path
    for i in range(count):
        layer = f"{slots.layers}.{i}"
        if parts.adapter is not None:
            theirs, ours = f"{layer}.{family.bottleneck}.adapters.{name}", slots.ffn_norm
            yield from _gate(parts.adapter.gated, f"{theirs}.gate", f"{layer}.{ours}.adapter.gate")
            for their, our in (("down.0", "down"), ("up", "up")):
                for kind, short in (("weight", "w"), ("bias", "b")):
                    yield (
                        f"{theirs}.adapter_{their}.{kind}",
                        f"{layer}.{ours}.adapter.{short}_{our}",
                    )
        if parts.prefix is not None and i not in parts.prefix.skip_layers:
            theirs = f"{layer}.{attention}.prefix_tuning.prefix_gates.{name}"
            yield from _gate(parts.prefix.gated, theirs, f"{layer}.{query}.extra_gates.prefix")
        if parts.lora is not None and (not parts.lora.layers or i in parts.lora.layers):
            for target in parts.lora.places:
                path = f"{layer}.{slots.places(target)[0][1].path}"
                theirs = f"{path}.loras.{name}"
                yield from _gate(parts.lora.gated, f"{theirs}.gate", f"{path}.gate")
                yield f"{theirs}.lora_A", f"{path}.lora_a"
                yield f"{theirs}.lora_B", f"{path}.lora_b"


def _gate(gated: bool | None, theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    if gated:
        yield f"{theirs}.weight", f"{ours}.weight"
        yield f"{theirs}.bias", f"{ours}.bias"


def _prefix(
    parts: Parts, left: dict[str, Tensor], key: str, base: PreTrainedModel, file: Path
) -> tuple[dict[str, Tensor], int | None]:
    """The prefixes, and the width of their reparametrisation if they have one."""
    assert parts.prefix is not None
    heads = base.config.num_attention_heads
    size = base.config.hidden_size // heads
    count = base.config.num_hidden_layers - len(set(parts.prefix.skip_layers))
    length = parts.prefix.prefix_length
    if f"{key}control_trans" in left:
        flat = _taken(left, f"{key}control_trans", file)
        shape = (length, count, 2, heads, size)
        if flat.numel() != length * count * 2 * heads * size:
            raise ValueError(
                f"from_pretrained: expected {key}control_trans with the numbers of {list(shape)} "
                "(prefix_length, layers, keys and values, heads, head size), got "
                f"{flat.numel()} in {file}"
            )
        return {"prefix.table": flat.view(shape).permute(1, 2, 0, 3, 4)}, None
    found = {
        "prefix.embedding.weight": _taken(left, f"{key}wte.weight", file),
        "prefix.down.weight": _taken(left, f"{key}control_trans.0.weight", file),
        "prefix.down.bias": _taken(left, f"{key}control_trans.0.bias", file),
    }
    for kind in ("weight", "bias"):
        rows = _taken(left, f"{key}control_trans.2.{kind}", file)
        if len(rows) != count * 2 * heads * size:
            raise ValueError(
                f"from_pretrained: expected {key}control_trans.2.{kind} with "
                f"{count * 2 * heads * size} rows (keys and values of {count} layers), got "
                f"{len(rows)} in {file}"
            )
        for i, of_layer in enumerate(rows.chunk(count)):
            found[f"prefix.up_{kind}.{i}"] = of_layer
    return found, parts.prefix.mid


def _taken(left: dict[str, Tensor], key: str, file: Path) -> Tensor:
    if key not in left:
        raise ValueError(f"from_pretrained: expected {key} (by its config) in {file}, found none")
    return left.pop(key)
