"""What a model does with files and states: only what is trained goes into them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..methods import MethodConfig, PrefixTuningConfig, with_part_changes
from ..nn import PrefixAttention
from .adapter_files import copy_weights, read_config, read_weights, write_adapter
from .allocation import check_size
from .pruning import Prunable
from .vocabulary import ADDED_ROWS, check_rows, vocabulary_of, word_embeddings

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Self

BASE = "base_model."
SHAPE_FIELDS = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads")


class LoadResult(NamedTuple):
    """What `load_state_dict` found, as torch's own result."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class Checkpointed(nn.Module):
    """What `PeltModel` does with files and states: only what is trained goes into them."""

    base_model: PreTrainedModel
    prefix: PrefixAttention | None
    method_config: MethodConfig
    _trained: tuple[str, ...]
    _is_detached: bool
    _first_values: dict[str, Tensor] | None
    _held_words: int

    if TYPE_CHECKING:

        def _take_out(self, keep_head: bool = False, keep_trained: bool = False) -> None: ...

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The method's parts and the head by name, whether they require a gradient now or not."""
        named = dict(self.named_parameters())
        return {name: named[name] for name in self._trained}

    def save_pretrained(
        self, directory: str | os.PathLike[str], *, collapse_prefix: bool = False, **ignored: Any
    ) -> None:
        """Writes adapter_config.json and adapter_model.safetensors: what was trained, the head
        included, nothing else but the word embeddings' rows that `resize_token_embeddings` added to
        what the base model was loaded from, as no other file has them.

        Args:
            directory: made if it is not there; earlier files are replaced whole, by os.replace.
            collapse_prefix: write the prefixes' keys and values instead of their reparametrisation:
                smaller, but training cannot resume from it. This model keeps its reparametrisation.
            ignored: further arguments that transformers passes to every model (``state_dict``,
                ``is_main_process``).

        Raises:
            ValueError: a trained number is not finite. OSError: the directory cannot be made or
                written, or there is no space. Earlier files are as they were.
        """
        self._check_attached("save_pretrained")
        tensors: dict[str, Tensor] = dict(self.trained_parameters())
        config = self.method_config
        if collapse_prefix and self.prefix is not None:
            tensors = {
                name: tensor for name, tensor in tensors.items() if not name.startswith("prefix.")
            }
            tensors["prefix.table"] = self.prefix.as_table()
            config = without_reparametrisation(config)
        base = describe_base(self.base_model)
        added = base["vocab_size"] - self._held_words
        if added > 0:
            name, weight = word_embeddings(self.base_model)
            if BASE + name not in tensors:
                base["vocab_added"], tensors[ADDED_ROWS] = added, weight[-added:]
        write_adapter(directory, config, base, tensors)

    def load_adapter(self, directory: str | os.PathLike[str]) -> None:
        """Loads what `save_pretrained` wrote into this model, which must have the same method.

        Raises:
            FileNotFoundError: a file is missing. ValueError: it is damaged, or of another method or
                model.
        """
        self._check_attached("load_adapter")
        config, base = read_config(directory)
        check_base(self.base_model, base, directory)
        if config != self.method_config:
            raise ValueError(
                f"load_adapter: expected {directory} to hold {self.method_config}, got {config}; "
                "use PeltModel.from_pretrained for it"
            )
        tensors = read_weights(directory, config)
        rows = tensors.pop(ADDED_ROWS, None)
        check_rows(rows, base, self.base_model, directory)
        copy_weights(self.trained_parameters(), tensors, directory)
        self._put_rows(rows)

    @classmethod
    def from_pretrained(
        cls, model: PreTrainedModel, directory: str | os.PathLike[str], is_trainable: bool = False
    ) -> Self:
        """The base model with an adapter that `save_pretrained` wrote. On an error the base model
        is as it was.

        Args:
            model: a model like the one the adapter was trained in, without a method.
            is_trainable: whether training goes on; if not, nothing requires a gradient and the
                model is in evaluation.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a damaged or cut file, another architecture, shape or method, or a number
                that is not finite.
        """
        config, base = read_config(directory)
        check_base(model, base, directory)
        tensors = read_weights(directory, config)
        rows = tensors.pop(ADDED_ROWS, None)
        check_rows(rows, base, model, directory)
        check_size(model, config, tensors, directory)
        made = cls(model, config)
        try:
            copy_weights(made.trained_parameters(), tensors, directory)
        except BaseException:
            made._take_out()
            raise
        made._put_rows(rows)
        if isinstance(made, Prunable):
            made.set_progress(1.0)
        if not is_trainable:
            made.requires_grad_(False)
            made.eval()
        return made

    def _put_rows(self, rows: Tensor | None) -> None:
        """Gives the last words a file's embeddings; the base model's own come back with it."""
        if rows is None:
            return
        name, weight = word_embeddings(self.base_model)
        if self._first_values is not None:
            self._first_values.setdefault(name, weight.detach().cpu().clone())
        with torch.no_grad():
            weight[-len(rows) :].copy_(rows)

    def state_dict(  # type: ignore[override]
        self, *args: Any, frozen: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """What is trained, by parameter name; with ``frozen`` the base model's weights too.

        transformers.Trainer saves a model's state_dict, so its checkpoints hold what is trained and
        nothing else.
        """
        state = super().state_dict(*args, **kwargs)
        if not frozen:
            prefix = kwargs.get("prefix", "")
            kept = {prefix + name for name in self._trained}
            for key in [key for key in state if key.startswith(prefix) and key not in kept]:
                del state[key]
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> LoadResult:
        """Loads what `state_dict` gives; names of the frozen base may be left out.

        Raises:
            RuntimeError: with ``strict``, a trained parameter is missing or a name is unknown; a
                shape differs.
        """
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = [name for name in result.missing_keys if name in self._trained]
        if strict and (missing or result.unexpected_keys):
            raise RuntimeError(
                "PeltModel.load_state_dict: expected every trained parameter and no other name, "
                f"got {len(missing)} missing "
                f"{missing[:3]} and {len(result.unexpected_keys)} unexpected "
                f"{result.unexpected_keys[:3]}"
            )
        return LoadResult(missing, list(result.unexpected_keys))

    def _check_attached(self, who: str) -> None:
        if self._is_detached:
            raise ValueError(
                f"{who}: expected the method to be in the model, got one inside disable_adapter() "
                "or removed"
            )


def describe_base(model: PreTrainedModel) -> dict[str, Any]:
    """What an adapter has to know about the model it was trained in."""
    described: dict[str, Any] = {name: getattr(model.config, name) for name in SHAPE_FIELDS}
    described["num_labels"] = getattr(model.config, "num_labels", None)
    described["vocab_size"] = vocabulary_of(model)
    described["architecture"] = type(model).__name__
    described["name_or_path"] = getattr(model.config, "_name_or_path", "") or None
    return described


def check_base(
    model: PreTrainedModel, described: dict[str, Any], directory: str | os.PathLike[str]
) -> None:
    """Raises ValueError where the adapter in the directory was trained in another kind of model."""
    mine = describe_base(model)
    differing = [
        name for name in (*SHAPE_FIELDS, "architecture") if described.get(name) != mine[name]
    ]
    if mine["num_labels"] != described.get("num_labels"):
        differing.append("num_labels")
    words = described.get("vocab_size")  # of files from before it was written: none
    is_resized = words is not None and words != mine["vocab_size"]
    if is_resized:
        differing.append("vocab_size")
    if differing:
        way_out = f"; model.resize_token_embeddings({words}) gives it as many words"
        raise ValueError(
            f"from_pretrained: expected a model like the one {directory} was trained in, with "
            f"{', '.join(f'{name}={described.get(name)}' for name in differing)}, got "
            f"{', '.join(f'{name}={mine[name]}' for name in differing)}"
            f"{way_out if is_resized else ''}"
        )


def without_reparametrisation(config: MethodConfig) -> MethodConfig:
    """The config of the same method after its prefix was collapsed to plain parameters."""
    return with_part_changes(config, PrefixTuningConfig, mid=None)
