"""What goes into an adapter's files and a model's states, and comes back: only what is trained."""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..methods import MethodConfig, PrefixTuningConfig, parts_of, with_part_changes
from ..nn import PrefixAttention
from .adapter_files import (
    FORMER_CONFIG_FILE,
    adapters_in,
    describe,
    read_config,
    read_weights,
    write_adapter,
)
from .first_values import head_names, names_in_place
from .formats import read_foreign
from .lora_targets import biases_of_targets
from .vocabulary import ADDED_ROWS, check_rows, vocabulary_of
from .wrapped import BASE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHAPE_FIELDS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")

_log = logging.getLogger(__name__)


class Adapter(NamedTuple):
    """An adapter as its two files hold it, on the CPU."""

    config: MethodConfig
    tensors: dict[str, Tensor]  # of what is trained, by parameter name
    rows: Tensor | None  # of words that the base model's own files do not have


def save_adapter(
    directory: str | os.PathLike[str],
    model: PreTrainedModel,
    config: MethodConfig,
    trained: Mapping[str, Tensor],
    rows: Tensor | None,
) -> None:
    """Writes what is trained, and the rows of words that no file of the base model holds."""
    tensors = dict(trained) | ({} if rows is None else {ADDED_ROWS: rows})
    write_adapter(directory, config, _base_with_rows(model, rows), tensors)


def state_entry(model: PreTrainedModel, config: MethodConfig, rows: Tensor | None) -> Tensor:
    """What `save_adapter` writes of the method and the base model, as bytes: the entry by which a
    model's state says what it is the state of.
    """
    described = describe(config, _base_with_rows(model, rows))
    text = json.dumps(described, sort_keys=True)
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _base_with_rows(model: PreTrainedModel, rows: Tensor | None) -> dict[str, Any]:
    base = describe_base(model)
    return base if rows is None else base | {"vocab_added": len(rows)}


def read_adapter(
    directory: str | os.PathLike[str],
    model: PreTrainedModel,
    expected: MethodConfig | None = None,
) -> Adapter:
    """What `save_adapter` or a library of `formats` wrote, for a model like the one it was trained
    in, and of the expected method where there is one. Of several in the folder it is the one that
    was written last, and the log names the others.
    """
    names = [files.config.name for files in adapters_in(directory)]
    if names[1:]:
        _log.warning(
            "from_pretrained: %s holds several adapters; the one of %s is read, which was written "
            "after %s",
            directory,
            names[0],
            " and ".join(names[1:]),
        )
    is_own = bool(names) and names[0] != FORMER_CONFIG_FILE
    foreign = None if is_own else read_foreign(directory, model)
    if foreign is not None:
        config, tensors = foreign
        _check_method(config, expected, directory)
        return Adapter(config, _from_base(model, config) | tensors, rows=None)
    config, base = read_config(directory)
    check_base(model, base, directory)
    _check_method(config, expected, directory)
    tensors = read_weights(directory, config)
    rows = tensors.pop(ADDED_ROWS, None)
    check_rows(rows, base, model, directory)
    return Adapter(config, tensors, rows)


def _from_base(model: PreTrainedModel, config: MethodConfig) -> dict[str, Tensor]:
    """The parameters that a method trains in place as the base model has them: another library's
    files need not hold all of them.
    """
    named = dict(model.named_parameters())
    parts = parts_of(config)
    others = biases_of_targets(model, parts.lora)
    names = names_in_place(model, parts, head_names(model), others)
    return {BASE + name: named[name].detach() for name in names}


def _check_method(
    config: MethodConfig, expected: MethodConfig | None, directory: str | os.PathLike[str]
) -> None:
    if expected is not None and config != expected:
        raise ValueError(
            f"load_adapter: expected {directory} to hold {expected}, got {config}; "
            "use PeltModel.from_pretrained for it"
        )


def collapsed(
    config: MethodConfig, trained: Mapping[str, Tensor], prefix: nn.Module
) -> tuple[MethodConfig, dict[str, Tensor]]:
    """The method and what is trained as they are after `PrefixAttention.collapse`, which is not
    called: the tables that these values of the prefixes give in the place of their
    reparametrisation.
    """
    tensors = dict(trained)
    for path, prefixes in prefix_sets(prefix).items():
        start = f"prefix.{path}." if path else "prefix."
        given = copy.deepcopy(prefixes)  # the model's own may be sharded
        values = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
        given.load_state_dict(values, assign=True)
        kept = given.as_tables()
        if "gate_bias" in given._parameters:
            kept["gate_bias"] = given.gate_bias.detach()
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(start)}
        tensors |= {start + name: table for name, table in kept.items()}
    return without_reparametrisation(config), tensors


def prefix_sets(prefix: nn.Module) -> dict[str, PrefixAttention]:
    """The sets of prefixes of a model, by the name of the kind of attention; of a model with one
    kind by an empty name.
    """
    named = prefix.named_modules()
    return {name: module for name, module in named if isinstance(module, PrefixAttention)}


def describe_base(model: PreTrainedModel) -> dict[str, Any]:
    """What an adapter has to know about the model it was trained in."""
    # A model of several others, of images and text, has its sizes in theirs.
    described: dict[str, Any] = {name: getattr(model.config, name, None) for name in SHAPE_FIELDS}
    described["num_labels"] = getattr(model.config, "num_labels", None)
    described["vocab_size"] = vocabulary_of(model)
    described["architecture"] = type(model).__name__
    described["name_or_path"] = getattr(model.config, "_name_or_path", "") or None
    return described


def check_base(
    model: PreTrainedModel, described: dict[str, Any], directory: str | os.PathLike[str]
) -> None:
    """Raises ValueError where the adapter in the directory was trained in another kind of model."""
    mine = describe_base(model)
    differing = [
        name for name in (*SHAPE_FIELDS, "architecture") if described.get(name) != mine[name]
    ]
    if mine["num_labels"] != described.get("num_labels"):
        differing.append("num_labels")
    words = described.get("vocab_size")  # of files from before it was written: none
    is_resized = words is not None and words != mine["vocab_size"]
    if is_resized:
        differing.append("vocab_size")
    if differing:
        way_out = f"; model.resize_token_embeddings({words}) gives it as many words"
        raise ValueError(
            f"from_pretrained: expected a model like the one {directory} was trained in, with "
            f"{', '.join(f'{name}={described.get(name)}' for name in differing)}, got "
            f"{', '.join(f'{name}={mine[name]}' for name in differing)}"
            f"{way_out if is_resized else ''}"
        )


def without_reparametrisation(config: MethodConfig) -> MethodConfig:
    """The config of the same method after its prefix was collapsed to plain parameters."""
    return with_part_changes(config, PrefixTuningConfig, mid=None)
