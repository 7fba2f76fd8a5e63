"""The two files of an adapter, written whole or not at all and believed only after every check."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .._version import __version__
from ..methods import MethodConfig, config_from_dict
from .tensor_files import DIGEST, digest, read_tensors, write_atomically, write_tensors

CONFIG_FILE = "pelt_config.json"
WEIGHTS_FILE = "pelt_model.safetensors"
# What this package called its files before: PEFT's names, by which others took them for PEFT's.
FORMER_CONFIG_FILE = "adapter_config.json"
FORMER_WEIGHTS_FILE = "adapter_model.safetensors"
# A model's state as transformers.Trainer writes it, and the entry in which it describes itself.
STATE_FILE = "model.safetensors"
STATE_ENTRY = "_extra_state"
FORMAT = 2
WITHOUT_DIGEST = 1  # of files from before the weights carried one
HEADER = "pelt_kernels"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# The types of what a config says about the base model, and how a sentence calls them.
BASE_TYPES: dict[str, tuple[tuple[type, ...], str]] = {
    "model_type": ((str,), "text"),
    "architecture": ((str,), "text"),
    "name_or_path": ((str, type(None)), "text or null"),
    "hidden_size": ((int, type(None)), "a whole number or null"),
    "num_hidden_layers": ((int, type(None)), "a whole number or null"),
    "num_attention_heads": ((int, type(None)), "a whole number or null"),
    "num_labels": ((int, type(None)), "a whole number or null"),
    "vocab_size": ((int,), "a whole number"),
    "vocab_added": ((int,), "a whole number"),
}

_log = logging.getLogger(__name__)


class Files(NamedTuple):
    """Where an adapter's config and its weights are: one file, where it is a model's state."""

    config: Path
    weights: Path


def files_in(directory: str | os.PathLike[str]) -> Files:
    """The files of the adapter in a folder, by the names that they have there; those of today where
    there is none. Of several the one that was written last.
    """
    folder = Path(directory)
    return next(iter(adapters_in(folder)), Files(folder / CONFIG_FILE, folder / WEIGHTS_FILE))


def adapters_in(directory: str | os.PathLike[str]) -> list[Files]:
    """The adapters that `save_pretrained`, a transformers.Trainer and other libraries left beside
    each other in a folder, the latest first. A state that is older than another one is not opened.
    """
    folder = Path(directory)
    own = Files(folder / CONFIG_FILE, folder / WEIGHTS_FILE)
    former = Files(folder / FORMER_CONFIG_FILE, folder / FORMER_WEIGHTS_FILE)
    state = Files(folder / STATE_FILE, folder / STATE_FILE)
    found = [files for files in (own, former) if files.config.is_file()]
    found.sort(key=_written, reverse=True)
    is_latest = not found or _written(state) > _written(found[0])
    return [state, *found] if is_latest and _state_entry(state.config) is not None else found


def _written(files: Files) -> int:
    """When an adapter was written, in ns. Its config is what a writer writes last; 0: not there."""
    return files.config.stat().st_mtime_ns if files.config.is_file() else 0


def _state_entry(path: Path) -> bytes | None:
    """What a model's state says of itself, or None where it is no state of this package's."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            if STATE_ENTRY in file.keys():  # noqa: SIM118  # the file is no dictionary
                return bytes(file.get_tensor(STATE_ENTRY).to(torch.uint8).numpy())
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(
            f"from_pretrained: {path} cannot be read, it is damaged or cut short ({error})"
        ) from error
    return None


def describe(config: MethodConfig, base: dict[str, Any]) -> dict[str, Any]:
    """What an adapter's files say of it."""
    return {
        "format": FORMAT,
        "pelt_kernels": __version__,
        "config": config.to_dict(),
        "base": base,
    }


def write_adapter(
    directory: str | os.PathLike[str],
    config: MethodConfig,
    base: dict[str, Any],
    tensors: dict[str, Tensor],
) -> None:
    """Writes both files through temporary ones, so that an interruption leaves the earlier pair or
    the new one. Equal adapters give equal bytes.

    The weights carry the config and a digest of themselves in their header, so a pair torn between
    two saves and a flipped bit are noticed on reading.

    Raises:
        ValueError: a tensor holds what is not finite. OSError: the directory cannot be made or
            written.
    """
    check_finite(tensors)
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    described = describe(config, base)
    text = json.dumps(described, indent=2, sort_keys=True)
    weights = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    write_tensors(target / WEIGHTS_FILE, weights, HEADER, {"config": described["config"]})
    write_atomically(target / CONFIG_FILE, text.encode() + b"\n")
    _remove_former(target)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError for a tensor that is to be saved and holds what is not finite."""
    for name, tensor in tensors.items():
        if not _extremes(tensor).isfinite().all():
            raise ValueError(
                f"save_pretrained: expected finite numbers, got NaN or infinity in {name}; the "
                "training has diverged, earlier files are as they were"
            )


def _remove_former(directory: Path) -> None:
    """Removes the adapter that an earlier version wrote: what stands there now replaced it, and by
    PEFT's names others would take the folder for PEFT's. Another library's adapter stays.
    """
    config = directory / FORMER_CONFIG_FILE
    if config.is_file() and f'"{HEADER}":' in config.read_text(errors="replace"):
        config.unlink()
        (directory / FORMER_WEIGHTS_FILE).unlink(missing_ok=True)


def read_described(path: Path) -> dict[str, Any]:
    """The JSON of a config, of this package or of another, or of a model's state.

    Raises:
        FileNotFoundError: no such file. ValueError: a damaged one.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"from_pretrained: expected {path.name} in {path.parent}, found none"
        )
    try:
        state = _state_entry(path) if path.name == STATE_FILE else None
        described = json.loads(path.read_bytes() if state is None else state)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"from_pretrained: {path} is not JSON, it is damaged or cut short ({error})"
        ) from error
    # What is no dictionary is a config of nobody's.
    return described if isinstance(described, dict) else {"format": type(described).__name__}


def read_config(directory: str | os.PathLike[str]) -> tuple[MethodConfig, dict[str, Any]]:
    """The method's config and the description of the base model.

    Raises:
        FileNotFoundError: no config. ValueError: a damaged one, one of another
            program, or a value of a wrong type, with its key.
    """
    path = files_in(directory).config
    described = read_described(path)
    found = described.get("format")
    if found not in (FORMAT, WITHOUT_DIGEST) or isinstance(found, bool):
        raise ValueError(
            f"from_pretrained: expected {path} in format {FORMAT} of pelt_kernels, got "
            f"{found!r:.80}; was it written by another library?"
        )
    base = described.get("base")
    if not isinstance(base, dict):
        raise ValueError(
            f"from_pretrained: expected {path} to describe its base model, got "
            f"{type(base).__name__}"
        )
    for key, (types, words) in BASE_TYPES.items():
        if key in base and (not isinstance(base[key], types) or isinstance(base[key], bool)):
            raise ValueError(
                f"from_pretrained: expected base.{key} as {words}, got {base[key]!r:.80} in {path}"
            )
    try:
        return config_from_dict(described.get("config", {})), base
    except (ValueError, RecursionError) as error:
        raise ValueError(f"from_pretrained: {error} (config in {path})") from error


def read_weights(directory: str | os.PathLike[str], config: MethodConfig) -> dict[str, Tensor]:
    """The tensors by parameter name, on the CPU.

    Raises:
        FileNotFoundError: no weights. ValueError: a truncated file, weights of
            another save, bytes that are not what was written, or a tensor of other than
            floating-point numbers.
    """
    files = files_in(directory)
    path = files.weights
    tensors, header = read_tensors(path, "from_pretrained", HEADER)
    if files.config == path:
        del tensors[STATE_ENTRY]
        check_dtypes(tensors, path)
        return tensors
    written, expected = _written_with(header)
    if written != config:
        raise ValueError(
            f"from_pretrained: {files.config.name} and {path.name} in {directory} are not from the "
            "same save; save the adapter again, or use an earlier checkpoint"
        )
    check_dtypes(tensors, path)
    if expected is None:
        _log.info("%s was written without a digest: a flipped bit in it cannot be noticed", path)
    elif digest(tensors) != expected:
        raise ValueError(
            f"from_pretrained: expected the tensors in {path} to have the digest of its header, "
            f"{expected:.12}, got {digest(tensors):.12}; the file is damaged"
        )
    return tensors


def check_dtypes(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises ValueError for a tensor of other than floating-point numbers."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"from_pretrained: expected {name} in "
                f"{', '.join(_dtype_name(dtype) for dtype in DTYPES[:-1])} or "
                f"{_dtype_name(DTYPES[-1])}, got {_dtype_name(tensor.dtype)} in {path}"
            )


def _written_with(header: Any) -> tuple[MethodConfig | None, str | None]:
    """The config that the weights were saved with (None: not ours) and their digest (None: they
    have none). Fields that came later than the file have their defaults.
    """
    try:
        if isinstance(header, dict) and DIGEST in header:
            return config_from_dict(header.get("config", {})), str(header[DIGEST])
        return config_from_dict(header), None
    except (ValueError, RecursionError):
        return None, None


def copy_weights(
    wanted: Mapping[str, Tensor], tensors: dict[str, Tensor], where: str | os.PathLike[str]
) -> None:
    """Copies tensors into the parameters of the same names, after checking all of them.

    Raises:
        ValueError: a missing or unknown name, another shape, or a number that is not finite or
            does not fit into the parameter's dtype; nothing is copied then.
    """
    missing = [name for name in wanted if name not in tensors]
    unknown = [name for name in tensors if name not in wanted]
    if missing or unknown:
        raise ValueError(
            f"from_pretrained: expected {where} to hold the {len(wanted)} tensors of this method "
            "in this model, got "
            f"{len(missing)} missing{_some(missing)} and {len(unknown)} unknown{_some(unknown)}"
        )
    for name, parameter in wanted.items():
        tensor = tensors[name]
        if parameter.shape != tensor.shape:
            raise ValueError(
                f"from_pretrained: expected {name} {list(parameter.shape)} (from the model), got "
                f"{list(tensor.shape)} in {where}"
            )
        extremes = _extremes(tensor)
        if not extremes.isfinite().all():
            raise ValueError(
                f"from_pretrained: expected finite numbers, got NaN or infinity in {name} in "
                f"{where}"
            )
        if not extremes.to(parameter.dtype).isfinite().all():
            raise ValueError(
                f"from_pretrained: expected {name} in the range of {_dtype_name(parameter.dtype)} "
                f"(from the model), got {extremes.abs().max():.3g} in {where}"
            )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])


@torch.no_grad()
def _extremes(tensor: Tensor) -> Tensor:
    """Minimum and maximum, both NaN where one entry is: a thirtieth of what asking each entry
    takes.
    """
    return torch.stack(torch.aminmax(tensor)) if tensor.numel() else tensor.new_zeros(2)


def _some(names: list[str]) -> str:
    return f" ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})" if names else ""


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
