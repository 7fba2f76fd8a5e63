"""The attributes of a batch's sentences as an input of the model: checked before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Under which a call gives what is read into words, one row for each sentence.
SENTENCES = ("input_ids", "inputs_embeds", "inputs")


def labels_of_call(
    attributes: Any, wanted: Mapping[str, int], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The labels int64 [B] by attribute.

    Args:
        attributes: what the call was given under that name.
        wanted: how many labels each attribute has.
        args, kwargs: the call's other arguments, which have B sentences.

    Raises:
        ValueError: an attribute is missing or unknown, or its labels are not int64 [B] below their
            number. A GPU's labels are not read, as for every index.
    """
    given = {} if attributes is None else attributes
    if not isinstance(given, Mapping) or set(given) != set(wanted):
        got = (
            f"{', '.join(map(str, given)) or 'none'}"
            if isinstance(given, Mapping)
            else (type(given).__name__)
        )
        raise ValueError(
            f"PeltModel: expected attributes {_example(wanted)}, got {got}"
            if wanted
            else f"PeltModel: expected no attributes, as the method has none, got {got}"
        )
    batch = batch_of(args, kwargs)
    for name, labels in given.items():
        if not isinstance(labels, Tensor):
            raise ValueError(
                f"PeltModel: expected attributes[{name!r}] as a tensor int64 [B], got "
                f"{type(labels).__name__}"
            )
        is_wrong = labels.ndim != 1 or labels.dtype != torch.int64
        if is_wrong or batch not in (None, labels.shape[0]):
            raise ValueError(
                f"PeltModel: expected attributes[{name!r}] int64 "
                f"[{'B' if batch is None else batch}], one label for each sentence, got "
                f"{list(labels.shape)} {str(labels.dtype).removeprefix('torch.')}"
            )
        if labels.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_range(name, labels, wanted[name])
    return dict(given)


def _check_range(name: str, labels: Tensor, count: int) -> None:
    """Raises ValueError where a label is none of an attribute's."""
    outside = labels[(labels < 0) | (labels >= count)]
    if len(outside):
        raise ValueError(
            f"PeltModel: expected attributes[{name!r}] from 0 to {count - 1}, got {int(outside[0])}"
        )


def _example(wanted: Mapping[str, int]) -> str:
    pairs = (f"{name!r}: int64 [B] from 0 to {count - 1}" for name, count in wanted.items())
    return f"as {{{', '.join(pairs)}}}"


def batch_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
    """The number of sentences, where the call has them."""
    for value in (*args[:1], *(kwargs.get(name) for name in SENTENCES)):
        if isinstance(value, Tensor) and value.ndim:
            return value.shape[0]  # len() would make a number of it, for which an export is fixed
    return None
