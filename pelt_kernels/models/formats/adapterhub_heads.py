"""Heads that the library ``adapters`` saved, as a transformers model has them.

It has two kinds: the head of a transformers class, with that class's own names, and the flexible
ones of its own model classes, a row of Linears for each head.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..first_values import head_names
from ..wrapped import BASE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)


class _Flexible(NamedTuple):
    """A flexible head that computes what a transformers class does."""

    linears: tuple[str, ...]
    use_pooler: bool = False
    activation_function: str | None = None


_DENSE = ("classifier.dense", "classifier.out_proj")
CLASSIFICATION = {
    "bert": _Flexible(("classifier",), use_pooler=True),
    "distilbert": _Flexible(("pre_classifier", "classifier"), activation_function="relu"),
    "electra": _Flexible(_DENSE, activation_function="gelu"),
    "roberta": _Flexible(_DENSE, activation_function="tanh"),
    "xlm-roberta": _Flexible(_DENSE, activation_function="tanh"),
}
TOKEN_HEADS = {"tagging": ("classifier",), "question_answering": ("qa_outputs",)}


def head_tensors(
    described: Any, tensors: dict[str, Tensor], base: PreTrainedModel, file: Path
) -> dict[str, Tensor]:
    """The base model's head by the names that it has here: as it was saved, or, if it was not, as
    it is.

    Raises:
        ValueError: a saved head that the base model's cannot be, with the field or the key.
    """
    wanted = head_names(base)
    own = dict(base.named_parameters())
    if not wanted:
        if tensors:
            _log.info("%s has no head and takes none from %s", type(base).__name__, file)
        return {}
    if not tensors:
        _log.warning("%s holds no head: %s keeps its own", file, type(base).__name__)
        return {BASE + name: own[name].detach() for name in wanted}
    config = described.get("config") if isinstance(described, dict) else None
    if isinstance(config, dict):
        tensors = _as_static(config, tensors, base, file)
    for key, tensor in tensors.items():
        # Embeddings that a head shares with the encoder are saved with it.
        is_shared = key in own and key not in wanted and torch.equal(own[key].cpu(), tensor)
        if key not in wanted and not is_shared:
            raise ValueError(
                f"from_pretrained: expected a head with {', '.join(sorted(wanted))} (from "
                f"{type(base).__name__}), got {key} in {file}; give from_pretrained a model with "
                "that head, or one without a head, which takes the adapter alone"
            )
    return {BASE + name: tensor for name, tensor in tensors.items() if name in wanted}


def _as_static(
    config: dict[str, Any], tensors: dict[str, Tensor], base: PreTrainedModel, file: Path
) -> dict[str, Tensor]:
    """The Linears of a flexible head under the names of a transformers class."""
    kind = config.get("head_type")
    like: _Flexible | None = None
    if kind == "classification":
        like = CLASSIFICATION[base.config.model_type]
    elif kind in TOKEN_HEADS:
        like = _Flexible(TOKEN_HEADS[kind])
    else:
        words = ", ".join(("classification", *TOKEN_HEADS))
        _refuse("head_type", f"one of {words}", kind, file)
    assert like is not None
    layers = len(like.linears)
    wanted: dict[str, Any] = {"layers": layers, "use_pooler": like.use_pooler}
    if layers > 1:
        wanted["activation_function"] = like.activation_function
    for name, value in wanted.items():
        got = config.get(name, False if name == "use_pooler" else None)
        if got != value:
            words = f"{value!r}, as {type(base).__name__} computes its head"
            _refuse(name, words, got, file)
    # heads.NAME.NUMBER.weight: the numbers of its Linears, in their order
    found: dict[str, Tensor] = {}
    matched = [(re.fullmatch(r"heads\.[^.]+\.(\d+)\.(weight|bias)", key), key) for key in tensors]
    strange = [key for match, key in matched if match is None]
    if strange:
        _refuse("its keys", "heads.NAME.NUMBER.weight and .bias", strange[0], file)
    numbers = sorted({int(match[1]) for match, _ in matched if match is not None})
    if len(numbers) != layers:
        _refuse("the head", f"{layers} Linears", len(numbers), file)
    for match, key in matched:
        assert match is not None
        found[f"{like.linears[numbers.index(int(match[1]))]}.{match[2]}"] = tensors[key]
    return found


def _refuse(name: str, words: str, value: Any, file: Path) -> None:
    raise ValueError(
        f"from_pretrained: expected {name} of the saved head as {words}, got {value!r:.80} for "
        f"{file}; a base model without a head takes the adapter alone"
    )
