"""PEFT's files: adapter_config.json with a peft_type, and adapter_model.safetensors or .bin."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...methods import MethodConfig
from ..adapter_files import FORMER_CONFIG_FILE, FORMER_WEIGHTS_FILE, check_dtypes, read_described
from ..first_values import head_names
from ..tensor_files import read_tensors
from ..wrapped import BASE
from .peft_lora import LORA_FIELDS, read_lora
from .peft_prefix import PREFIX_FIELDS, read_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Reader = Callable[
    [Mapping[str, Any], dict[str, Tensor], "PreTrainedModel", str],
    tuple[MethodConfig, dict[str, Tensor]],
]
PICKLED_FILE = "adapter_model.bin"
# What torch, zip and pickle raise for a truncated or foreign file.
UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
)
# What says nothing of the outputs.
SILENT_FIELDS = (
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "modules_to_save",  # the tensors say which
    "peft_type",
    "peft_version",
    "revision",
    "task_type",
)
TYPES: dict[str, tuple[Reader, tuple[str, ...]]] = {
    "LORA": (read_lora, LORA_FIELDS),
    "PREFIX_TUNING": (read_prefix, PREFIX_FIELDS),
}
# How PEFT's names of a base model's modules begin, LoRA's and those of prompts.
PREFIXES = ("base_model.model.", "base_model.")


def recognises(folder: Path) -> bool:
    """Whether PEFT wrote the adapter in a folder."""
    try:
        return "peft_type" in read_described(folder / FORMER_CONFIG_FILE)
    except (FileNotFoundError, ValueError):
        return False  # of whichever library: the usual reading has the sentence for it


def read(folder: Path, base: PreTrainedModel) -> tuple[MethodConfig, dict[str, Tensor]]:
    """PEFT's LoRA and prefix tuning, with the same outputs.

    Raises:
        FileNotFoundError: no weights. ValueError: a damaged file, another of PEFT's types, or a
            field or tensor that has nothing like it here, by name.
    """
    described = read_described(folder / FORMER_CONFIG_FILE)
    kind, where = described["peft_type"], f"{folder} (written by PEFT)"
    if kind not in TYPES:
        raise ValueError(
            f"from_pretrained: expected peft_type as one of {', '.join(TYPES)}, got {kind!r:.80} "
            f"in {where}; peft.PeftModel.from_pretrained reads it"
        )
    reader, fields = TYPES[kind]
    for field, value in described.items():
        if value and field not in SILENT_FIELDS and field not in fields:
            raise ValueError(
                f"from_pretrained: expected a field that has something like it here, got {field}="
                f"{value!r:.80} in {where}; peft.PeftModel.from_pretrained reads it"
            )
    tensors = _by_own_names(_read_tensors(folder))
    config, own = reader(described, tensors, base, where)
    return config, own | _in_place(tensors, config, base, where)


def _by_own_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by their names in the base model.

    With ``bias="all"`` PEFT also writes the biases inside its wrapper of a saved module: those that
    the module had before, which nothing reads, and the trained ones, which have their own names.
    """
    found = {}
    for key, tensor in tensors.items():
        prefix = next((each for each in PREFIXES if key.startswith(each)), "")
        if ".original_module." not in key and ".modules_to_save." not in key:
            found[key.removeprefix(prefix)] = tensor
    return found


def _in_place(
    tensors: Mapping[str, Tensor], config: MethodConfig, base: PreTrainedModel, where: str
) -> dict[str, Tensor]:
    """What is left of the tensors: of the head, and biases where LoRA has them trained.

    Raises:
        ValueError: one of another parameter, or of none.
    """
    head = head_names(base)
    biases = getattr(config, "bias", "none")
    named = dict(base.named_parameters())
    found = {}
    for key, tensor in tensors.items():
        name = key.replace(".base_layer.", ".")
        is_bias = biases != "none" and name.endswith("bias")
        if name not in named or not (name in head or is_bias):
            raise ValueError(
                "from_pretrained: expected tensors of the method and of the head of "
                f"{type(base).__name__}, got {key} in {where}"
                f"{_why_not(name, named)}"
            )
        found[BASE + name] = tensor
    return found


def _why_not(name: str, named: Collection[str]) -> str:
    if name not in named:
        return ", which this model does not have; it was trained in another kind of model"
    return "; modules_to_save other than the head are trained as a whole by method 'full' only"


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors by PEFT's names, on the CPU."""
    path, pickled = folder / FORMER_WEIGHTS_FILE, folder / PICKLED_FILE
    if path.is_file() or not pickled.is_file():
        tensors, _ = read_tensors(path, "from_pretrained", "format")
    else:
        path = pickled
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except UNREADABLE as error:
            raise ValueError(
                f"from_pretrained: {path} cannot be read, it is damaged or holds more than tensors "
                f"({str(error).partition(chr(10))[0]})"
            ) from error
    are_named = isinstance(tensors, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    )
    if not are_named:
        raise ValueError(
            f"from_pretrained: expected {path} to hold tensors by name, got "
            f"{type(tensors).__name__} of other things"
        )
    check_dtypes(tensors, path)
    return tensors
