"""The rows of the word embeddings that the base model's own files do not hold."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import try_to_load_from_cache
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADDED_ROWS = "vocabulary.added"


def input_embeddings(model: PreTrainedModel) -> nn.Module | None:
    """The module that transformers names as the one that embeds the input; None where it knows
    none, as for some models of speech.
    """
    try:
        found: nn.Module | None = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found


def vocabulary_of(model: PreTrainedModel) -> int:
    """How many words the model has embeddings for; 0 of one that reads none."""
    weight: Any = getattr(input_embeddings(model), "weight", None)
    return len(weight) if _reads_words(model) and weight is not None else 0


def _reads_words(model: PreTrainedModel) -> bool:
    return getattr(model, "main_input_name", None) != "pixel_values"


def word_embeddings(model: PreTrainedModel) -> tuple[str, Tensor]:
    """The name of the word embeddings' weight in the model, and the weight [words, D]."""
    if not _reads_words(model):
        raise ValueError(
            f"PeltModel: expected a model with word embeddings, got {type(model).__name__}, which "
            "reads images"
        )
    weight: Any = getattr(input_embeddings(model), "weight", None)
    for name, parameter in model.named_parameters():
        if parameter is weight:
            return name, weight
    got = "none" if weight is None else "a weight that is computed from others"
    raise ValueError(
        f"PeltModel: expected the word embeddings of {type(model).__name__} to be a "
        f"parameter of it, got {got}"
    )


def held_words(model: PreTrainedModel) -> int:
    """How many words the files hold from which the model was loaded: its rows beyond are in no file
    but the adapter's. As many as it has where that is not known: a model that was loaded from
    nowhere, or from a folder that is gone.
    """
    source = getattr(model.config, "_name_or_path", "")
    path: Any = Path(source, "config.json") if source else None
    if path is not None and not path.is_file():
        path = None if os.path.isabs(source) else _cached_config(source)
    if path is None:
        return vocabulary_of(model)
    try:
        held = json.loads(Path(path).read_text(encoding="utf-8")).get("vocab_size")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"get_pelt_model: expected {path}, from which the base model came, as the "
            f"configuration of a model, got {error}"
        ) from error
    return held if isinstance(held, int) else vocabulary_of(model)


def check_rows(
    rows: Tensor | None, described: dict[str, Any], model: PreTrainedModel, where: object
) -> None:
    """Raises ValueError where a file's rows are not those that its description promises."""
    added = described.get("vocab_added") or 0
    if not added and rows is None:
        return
    _, weight = word_embeddings(model)
    expected = [added, *weight.shape[1:]] if added else None
    got = None if rows is None else list(rows.shape)
    if got != expected or added > len(weight):
        raise ValueError(
            f"from_pretrained: expected added words {expected} in {where} (vocab_added={added} of "
            f"{len(weight)} words), got {got}"
        )
    if rows is not None and not rows.to(weight.dtype).isfinite().all():
        raise ValueError(
            f"from_pretrained: expected finite numbers in the range of {weight.dtype}, got others "
            f"in {ADDED_ROWS} in {where}"
        )


def check_count(rows: Tensor, model: PreTrainedModel, held: int) -> None:
    """Raises RuntimeError where a state holds rows for another number of added words."""
    added = vocabulary_of(model) - held
    if added > 0 and len(rows) != added:
        raise RuntimeError(
            f"PeltModel.load_state_dict: expected {ADDED_ROWS} for the {added} words that were "
            f"added to the {held} of the base model, got {len(rows)}; "
            f"model.resize_token_embeddings({held + len(rows)}) gives it as many"
        )


def _cached_config(name: str) -> str | None:
    """The file in the hub's cache on this machine; nothing is asked for over the network."""
    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name of a repository: a relative folder that is not here
        return None
    return found if isinstance(found, str) else None
