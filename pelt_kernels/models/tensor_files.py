"""A safetensors file with a header of the package's own, which carries a digest of the tensors:
written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

DIGEST = "sha256"  # the digest's key in a header


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], key: str, header: dict[str, Any]
) -> None:
    """Writes CPU tensors and, under one key of the file's metadata, the header with their digest.

    safetensors writes several keys in an order of its own, another one each time: one key makes
    equal tensors equal files.
    """
    text = json.dumps(header | {DIGEST: digest(tensors)}, sort_keys=True)
    write_atomically(path, safetensors_bytes(dict(tensors), metadata={key: text}))


def read_tensors(path: Path, who: str, key: str) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a file, on the CPU, and the header under a key (None: there is none that is
    JSON). Whether the digest is theirs is for the caller to ask: `digest`.

    Raises:
        FileNotFoundError: no such file. ValueError: a damaged or cut one.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{who}: expected {path.name} in {path.parent}, found none")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(
            f"{who}: {path} cannot be read, it is damaged or cut short ({error})"
        ) from error
    try:
        return tensors, json.loads(metadata.get(key, ""))
    except (ValueError, RecursionError):
        return tensors, None


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of CPU tensors, in the order of their names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Through a temporary file in the same folder, with the permissions of a plain open()."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
