"""Adapters on the Hugging Face hub: found by their ids, and pushed with a card."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from .._version import __version__

# What an adapter's files are called, this package's and others'.
FILES = ("pelt_*", "adapter*", "model.safetensors", "head_config.json", "*model_head.*")
CARD_FILE = "README.md"
_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def local_folder(adapter: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder of an adapter: one that is there, or the hub's of that id, as `huggingface_hub`
    downloads or has it.

    Raises:
        FileNotFoundError: neither is there, or the hub cannot be reached.
    """
    folder = Path(adapter)
    if folder.exists() or not isinstance(adapter, str) or not _ID.fullmatch(adapter):
        return folder
    try:
        found = huggingface_hub.snapshot_download(
            adapter, revision=revision, allow_patterns=list(FILES)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"from_pretrained: expected a folder or the id of a repository on the hub, got "
            f"{adapter!r}, which is neither here nor reached there "
            f"({str(error).strip().partition(chr(10))[0]})"
        ) from error
    return Path(found)


def push(
    model: Any,
    repo_id: str,
    *,
    private: bool | None,
    token: str | bool | None,
    commit_message: str,
    revision: str | None,
    create_pr: bool,
    options: dict[str, Any],
) -> str:
    """Uploads what a `PeltModel` saves and a card; gives the commit's address."""
    api = huggingface_hub.HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **options)
        card = card_of(model, repo_id)
        Path(folder, CARD_FILE).write_text(card, encoding="utf-8")
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        return str(
            api.upload_folder(
                repo_id=name,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )
        )


def _size(model: Any) -> str:
    """How many parameters were trained, and how many are left to store, in a sentence."""
    trained = sum(parameter.numel() for parameter in model.trained_parameters().values())
    stored = model.get_nb_stored_parameters()
    if trained == stored:
        return f"These are {trained:,} parameters."
    return (
        f"{trained:,} parameters were trained; {stored:,} are enough to use it, and "
        "`pelt-kernels export --format adapter` leaves those."
    )


def card_of(model: Any, repo_id: str) -> str:
    """A `PeltModel`'s card: its base model, its method, its size, and how it is opened."""
    base, config = model.base_model, model.method_config
    name = getattr(base.config, "_name_or_path", "") or ""
    has_id = bool(re.fullmatch(rf"{_ID.pattern}|[\w][\w.-]*", name)) and not Path(name).exists()
    front = ["library_name: pelt_kernels", f"tags: [pelt_kernels, {config.method}]"]
    front += [f"base_model: {name}"] if has_id else []
    text = [
        "---",
        *front,
        "---",
        "",
        f"# {repo_id}",
        "",
        f"An adapter of the method `{config.method}` for {f'`{name}`' if has_id else 'a model'} "
        f"(`{type(base).__name__}`), saved by pelt_kernels {__version__}. It holds what was "
        f"trained; the base model is not in it. {_size(model)}",
        "",
        "```python",
        "from pelt_kernels import PeltModel",
        f"from transformers import {type(base).__name__}",
        "",
        f'base = {type(base).__name__}.from_pretrained("{name if has_id else "the base model"}")',
        f'model = PeltModel.from_pretrained(base, "{repo_id}")',
        "```",
        "",
        f"Its config: `{config.to_dict()}`",
        "",
    ]
    return "\n".join(text)
