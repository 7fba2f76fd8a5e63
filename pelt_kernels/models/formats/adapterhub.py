"""Folders that the library ``adapters`` (AdapterHub) writes with ``save_adapter``.

A folder holds adapter_config.json with a config and the base model's class, its weights in
adapter.safetensors or pytorch_adapter.bin, and, where the head was saved too, head_config.json and
model_head.safetensors or pytorch_model_head.bin. Written by ``adapters`` 1.3 and compared with it;
the versions before (``adapter-transformers``) have the same keys.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...methods import MethodConfig
from ..tensor_files import read_tensors
from .adapterhub_config import method_of, parts_of_config
from .adapterhub_heads import head_tensors
from .adapterhub_tensors import FAMILIES, adapter_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG_FILE, HEAD_CONFIG_FILE = "adapter_config.json", "head_config.json"
WEIGHTS_FILES = ("adapter.safetensors", "pytorch_adapter.bin")
HEAD_FILES = ("model_head.safetensors", "pytorch_model_head.bin")
FUSION_CONFIG_FILE = "adapter_fusion_config.json"
MARKS = {"config", "hidden_size", "model_class", "model_type"}


def recognises(folder: Path) -> bool:
    """Whether ``adapters`` wrote the adapter in a folder, or the fusion of several."""
    if not (folder / CONFIG_FILE).is_file():
        return (folder / FUSION_CONFIG_FILE).is_file()
    try:
        described = _read_json(folder / CONFIG_FILE)
    except ValueError:
        return False  # of whichever library: the usual reading has the sentence for it
    return isinstance(described, dict) and described.keys() >= MARKS


def read(folder: Path, base: PreTrainedModel) -> tuple[MethodConfig, dict[str, Tensor]]:
    """The adapter as a method's config and its tensors. A head that was not saved is the base
    model's own, and a base model without a head takes none.

    Raises:
        FileNotFoundError: no weights. ValueError: what has no counterpart here, with the field of
            the config or the tensor's key; another base model; a damaged file.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"from_pretrained: expected one adapter, got a fusion of several ({FUSION_CONFIG_FILE} "
            f"in {folder}); AdapterFusion has no counterpart here, load its adapters by themselves"
        )
    described = _read_json(folder / CONFIG_FILE)
    where = folder / CONFIG_FILE
    _check_base(described, base, where)
    family = FAMILIES[base.config.model_type]
    parts = parts_of_config(described, base.config, where)
    file, tensors = _weights(folder, WEIGHTS_FILES)
    found, parts = adapter_tensors(parts, tensors, str(described["name"]), base, family, file)
    head_config: Any = {}
    head: dict[str, Tensor] = {}
    head_file = folder
    if any((folder / name).is_file() for name in HEAD_FILES):
        head_file, head = _weights(folder, HEAD_FILES)
        head_config = _read_json(folder / HEAD_CONFIG_FILE)
    found |= head_tensors(head_config, head, base, head_file)
    return method_of(parts), found


def _check_base(described: dict[str, Any], base: PreTrainedModel, where: Path) -> None:
    """Raises ValueError where the adapter was made for another model than the one that is given."""
    for key in ("model_type", "hidden_size"):
        own = getattr(base.config, key, None)
        if described[key] != own:
            raise ValueError(
                "from_pretrained: expected a base model like the one the adapter was made for, "
                f"with {key}={described[key]!r:.80} ({where}), got {own!r}"
            )
    if base.config.model_type not in FAMILIES:
        raise ValueError(
            "from_pretrained: expected an adapter of the library adapters for a model of the "
            f"families {', '.join(FAMILIES)}, got model_type={base.config.model_type!r} in {where}"
        )
    if not isinstance(described.get("name"), str):
        raise ValueError(
            "from_pretrained: expected name, which is part of its tensors' keys, as text, got "
            f"{described.get('name')!r:.80} in {where}"
        )


def _weights(folder: Path, names: tuple[str, ...]) -> tuple[Path, dict[str, Tensor]]:
    """The tensors of the first of the files that is there, and which it is."""
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"from_pretrained: expected {' or '.join(names)} in {folder}, found none"
        )
    if file.suffix == ".safetensors":
        return file, read_tensors(file, "from_pretrained", "")[0]
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"from_pretrained: {file} cannot be read as tensors, it is damaged, cut short or holds "
            f"other objects ({type(error).__name__}: {reason:.200})"
        ) from error
    others = [loaded] if not isinstance(loaded, dict) else list(loaded.values())
    for value in others:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise ValueError(
                "from_pretrained: expected floating-point tensors by name in "
                f"{file}, got {getattr(value, 'dtype', type(value).__name__)}"
            )
    return file, loaded


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(
            f"from_pretrained: expected {path.name} in {path.parent}, found none"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"from_pretrained: {path} is not JSON, it is damaged or cut short ({error})"
        ) from error
