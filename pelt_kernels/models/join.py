"""One model for many tasks out of adapters that were trained apart (VLM)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..methods import VLMConfig
from .adapter_files import files_in, read_config, read_weights, write_adapter
from .vocabulary import ADDED_ROWS

_ADAPTERS = re.compile(r"task_adapters\.\d+\.(\w+)")
_TOKENS = "tokens.weight"
# The dimension of a bank [M, ...] that is a task's own bottleneck.
_BOTTLENECK = {"w_down": 1, "b_down": 1, "w_up": 2}


class _File:
    """One of the adapters to be joined."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        config, self.base = read_config(directory)
        if not isinstance(config, VLMConfig):
            raise ValueError(
                f"join_adapters: expected adapters of the method 'vlm', got {config.method!r} in "
                f"{directory}"
            )
        self.directory, self.config = directory, config
        self.tensors = read_weights(directory, config)
        known = (_TOKENS, ADDED_ROWS)
        others = [n for n in self.tensors if not (_ADAPTERS.fullmatch(n) or n in known)]
        if others:
            raise ValueError(
                "join_adapters: expected adapters of tasks and words, which a model has side by "
                f"side, got {others[0]} in {directory}, of which it has one"
            )

    def words(self) -> dict[int, Tensor]:
        """The rows of the trained words by id."""
        count = self.base.get("vocab_size", 0)
        ids = sorted(word + count if word < 0 else word for word in self.config.trainable_tokens)
        return dict(zip(ids, self.tensors.get(_TOKENS, ())))


def join_adapters(
    directories: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]
) -> VLMConfig:
    """Writes the tasks of several adapters, which `PeltModel.save_pretrained` wrote, as one.

    The tasks are numbered one file after the other, each with its own bottleneck; what a task
    answers is what it answered. Trained words come together; where several files have the same
    word, they have to have the same row for it.

    Args:
        directories: two at least, of the same base model with the same vocabulary.
        output: a new directory.

    Returns:
        The config of what was written.

    Raises:
        FileNotFoundError: a file is missing. ValueError: another method, another base model, a task
            or a word of two files, a head beside the adapters, or an output that is there.
    """
    if len(directories) < 2:
        raise ValueError(f"join_adapters: expected two adapters at least, got {len(directories)}")
    if files_in(output).config.exists():
        raise ValueError(f"join_adapters: expected a new directory, got {output} with an adapter")
    files = [_File(directory) for directory in directories]
    for file in files[1:]:
        _check_base(files[0], file)
    tasks = [task for file in files for task in file.config.tasks]
    twice = next((task for task in tasks if tasks.count(task) > 1), None)
    if twice is not None:
        raise ValueError(
            f"join_adapters: expected different tasks in the adapters, got {twice!r} in two of them"
        )
    sizes = [size for file in files for size in file.config.bottleneck_of_each()]
    words = _joined_words(files)
    config = replace(
        files[0].config,
        tasks=tuple(tasks),
        bottlenecks=tuple(sizes),
        trainable_tokens=tuple(sorted(words)),
    )
    tensors = _joined_banks(files, max(sizes))
    if words:
        tensors[_TOKENS] = torch.stack([words[word] for word in sorted(words)])
    if ADDED_ROWS in files[0].tensors:
        tensors[ADDED_ROWS] = files[0].tensors[ADDED_ROWS]
    write_adapter(output, config, files[0].base, tensors)
    return config


def _joined_banks(files: list[_File], bottleneck: int) -> dict[str, Tensor]:
    """The banks [M, ...] of all tasks, as high as the largest."""
    tensors = {}
    for name in files[0].tensors:
        match = _ADAPTERS.fullmatch(name)
        if match is None:
            continue
        parts = []
        for file in files:
            part = file.tensors[name]
            dimension = _BOTTLENECK.get(match[1])
            if dimension is not None:
                behind = part.ndim - 1 - dimension
                part = F.pad(part, [0, 0] * behind + [0, bottleneck - part.shape[dimension]])
            parts.append(part.to(files[0].tensors[name].dtype))
        tensors[name] = torch.cat(parts)
    return tensors


def _joined_words(files: list[_File]) -> dict[int, Tensor]:
    """The rows of all trained words by id."""
    joined: dict[int, Tensor] = {}
    for file in files:
        for word, row in file.words().items():
            if word in joined and not torch.equal(joined[word], row):
                raise ValueError(
                    "join_adapters: expected trained words of one adapter each, got other "
                    f"embeddings of word {word} in {file.directory} than before; give each task "
                    "words of its own"
                )
            joined[word] = row
    return joined


def _check_base(first: _File, other: _File) -> None:
    """Raises ValueError unless two adapters are of the same base model."""
    keys = [key for key in first.base if key not in ("name_or_path",)]
    differing = [key for key in keys if first.base[key] != other.base.get(key)]
    if differing or set(first.tensors) - {_TOKENS} != set(other.tensors) - {_TOKENS}:
        key = differing[0] if differing else "layers"

        def told(base: dict[str, Any]) -> str:
            return f"{key} {base.get(key, 'of another number')!r}"

        raise ValueError(
            f"join_adapters: expected adapters of one base model, got {told(first.base)} in "
            f"{first.directory} and {told(other.base)} in {other.directory}"
        )
