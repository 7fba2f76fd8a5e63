"""A transformers model with a method's parts in it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..methods import MethodConfig, parts_of
from .allocation import check_size
from .checkpoint import collapsed, read_adapter, save_adapter, state_entry
from .checks import why_padded
from .formats.peft_writer import write_peft
from .gate_penalty import penalised_forward
from .hub import local_folder, push
from .inject import raise_occupied
from .mixture import consistent_forward
from .pruning import check_progress, density
from .several import DEFAULT, check_config, check_name
from .sharded import is_writer_of, trained_of, whole
from .vocabulary import ADDED_ROWS
from .weighted import WeightedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerCallback
    from typing_extensions import Self

PEFT = "peft"
FILE_FORMATS = ("pelt", PEFT)


class PeltModel(WeightedModel):
    """A frozen transformers model, a method's parts inside it, and its trained classification head,
    where it has one.

    Made by `get_pelt_model`. It is called like the model it holds (``base_model``, the very object
    it was given) and forwards attributes to it. Trained are the method's parts and the head, which
    is every parameter of the model outside transformers' ``model.base_model``: RoBERTa's dense
    layer and DistilBERT's pre_classifier belong to it, BERT's pooler does not, nor does what gives
    each word of a language model its logit.

    New parameters are float32 beside 16-bit weights, else they have the weights' dtype.
    `state_dict` holds what is trained; the frozen base is not part of a checkpoint
    (``state_dict(frozen=True)`` for everything).

    Attributes:
        base_model: the model, with the parts in it.
        method_config: the method's config.
        prefix: the prefixes of all layers (`pelt_kernels.nn.PrefixAttention`), or, in a model with
            several kinds of attention, those of each kind by its name; or None.
        task_adapters: VLM's adapters of each layer, or None.
        written: HyperPELT's networks, or what `materialize` left of them; or None.
        tokens: the trained rows of the word embeddings (`Parts.trainable_tokens`), or None.
    """

    def __init__(
        self, model: PreTrainedModel, config: MethodConfig, adapter_name: str = DEFAULT
    ) -> None:
        check_config("get_pelt_model", config)
        check_name("get_pelt_model", adapter_name)
        if isinstance(model, PeltModel):
            raise_occupied()
        if not hasattr(model, "config"):
            raise ValueError(
                f"get_pelt_model: expected a transformers model, got {type(model).__name__}"
            )
        super().__init__(model)
        self._put_in(adapter_name, config)

    def forward(
        self,
        *args: Any,
        attributes: Mapping[str, Tensor] | None = None,
        adapter_names: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward: its arguments, which `inspect.signature` shows, and its
        outputs, as they are without a method.

        attributes are labels int64 [B] by name, which choose each sentence's prefixes, where the
        method has attributes (`ControlPrefixesConfig`); transformers.Trainer takes them as a column
        of that name, a dictionary in each batch.

        An attention_mask is [B, N], 1 for tokens, 0 for padding; None: no padding; the gates pool
        over tokens by it. With output_attentions=True the weights of a layer with a prefix are [B,
        H, S, P + S], prefix columns first. AdaMix in training makes two passes and adds its
        consistency to the loss, see `AdaMixConfig`; UniPELT's `gate_penalty` is a term of it, too.

        A method for several tasks takes ``tasks``, a name, a number or int64 [B] (`set_task` sets
        one for all calls), and HyperPELT with `features` takes ``image_features`` [B, cells, F].

        adapter_names are the names of B adapters, one for each sample, in evaluation; ``__base__``
        is the base model without any, its own head included. Each sample's outputs are those of its
        adapter alone. None: the active adapter, for all.

        Raises:
            ValueError: a mask of another shape; attributes that are missing, unknown or no labels
                of theirs; tasks or features that are missing or wrong; PST in training where
                nothing says how far the training is (`set_progress`, `callbacks`). adapter_names
                that are unknown or not as many as the samples, in training, or of an adapter
                that cannot serve some samples of a batch only, with the reason.
        """
        self._check_skipping()
        if adapter_names is not None:
            with self._mixed(adapter_names, args, {"attributes": attributes, **kwargs}):
                return self.base_model(*args, **kwargs)
        parts = parts_of(self.method_config)
        is_training = self.base_model.training and not self._is_detached
        if is_training:
            check_progress(self.method_config, self._progress)
        with self._labels(attributes, args, kwargs):
            if is_training and parts.mixture is not None and self._compares_passes:
                return consistent_forward(self.base_model, parts.mixture.consistency, args, kwargs)
            if is_training and parts.gate_penalty and torch.is_grad_enabled():
                call = self._injection.call
                return penalised_forward(self.base_model, parts, call, args, kwargs)
            return self.base_model(*args, **kwargs)

    def set_unpadding(self, is_on: bool = True) -> None:
        """Has the layers compute real tokens only, from the next forward on, or all that is there.

        Off by default. A batch's attention_mask says which tokens are real; all products, norms,
        adapters and their gradients of a layer are of these, one sentence behind the other, and
        attention alone is computed where they stand. Outputs for real tokens and gradients are what
        they are without, to rounding; random numbers of dropout are others. Hidden states of
        padding are zeros, so what reads them beside a mask of its own (labels of -100, a pooling by
        the mask, the first token) sees no difference.

        A forward works as ever where nothing is gained: without an attention_mask, with little
        padding or with some on the left, under torch.compile and export, in a checkpointed layer,
        with `skip_below` and with adapter_names. On a GPU the host waits for the mask in every
        forward. It belongs to the active adapter, and no file holds it.

        Raises:
            ValueError: a model whose layers read positions or masks by themselves (T5, ModernBERT,
                decoders), gates that do not pool with ``masked_mean``, VLM or HyperPELT.
        """
        self._check_attached("set_unpadding")
        injection = self._injection
        if is_on:
            stacks = [stack.slots for stack in injection.stacks]
            why_not = why_padded(self.base_model, stacks, parts_of(self.method_config))
            if why_not:
                raise ValueError(f"set_unpadding: {why_not}")
        injection.check_detachable("set_unpadding")
        self._detach()
        injection.set_packing(is_on)
        self._attach()

    def density(self) -> dict[str, float]:
        """Of each matrix that PST prunes, by its Linear's name, the share that is not 0 now."""
        return density(self.base_model, self.method_config)

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base model's loss takes num_items_in_batch; transformers.Trainer asks. A
        consistency and a penalty of gates, which are means over the batch, do not.
        """
        has_mean = self._compares_passes or bool(parts_of(self.method_config).gate_penalty)
        return not has_mean and super().accepts_loss_kwargs

    def callbacks(self) -> list[TrainerCallback]:
        """What a transformers.Trainer needs to train the method as its paper does, for its
        ``callbacks``: PST's sparsity, AdaMix's care of experts that were not drawn. Empty for other
        methods.
        """
        # transformers' Trainer takes seconds to import, which only training needs.
        from .callbacks import callbacks_for

        return callbacks_for(self, parts_of(self.method_config))

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        format: str = "pelt",
        collapse_prefix: bool = False,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        selected_adapters: Sequence[str] | None = None,
        **ignored: Any,
    ) -> None:
        """Writes pelt_config.json and pelt_model.safetensors: what was trained, the head
        included, nothing else but the word embeddings' rows that `resize_token_embeddings` added to
        what the base model was loaded from, as no other file has them.

        Args:
            directory: made if it is not there; earlier files are replaced whole, by os.replace. As
                in PEFT, the adapter ``default`` is written there and any other one into a folder of
                its name in it.
            format: ``pelt``, or ``peft`` for LoRA without gates and a decoder's prefix, collapsed:
                adapter_config.json and adapter_model.safetensors, from which
                ``peft.PeftModel.from_pretrained`` and servers that read PEFT's files have the same
                outputs.
            collapse_prefix: write the prefixes' keys and values instead of their reparametrisation:
                smaller, but training cannot resume from it. This model keeps its reparametrisation.
            is_main_process: False: this process writes nothing. Parameters that FSDP2 has sharded
                are gathered, for which every process has to call this; the first of them writes.
            state_dict: what to write instead of the model's own values, such as
                ``accelerator.get_state_dict`` gives; it is the active adapter's.
            selected_adapters: by name; None: all, or with state_dict the active one.
            ignored: further arguments that transformers passes to every model.

        Raises:
            ValueError: a trained number is not finite, or missing in state_dict; an unknown format
                or adapter, or a method that PEFT's files cannot hold, with the reason. OSError: the
                directory cannot be made or written, or there is no space. Earlier files are as they
                were, those of adapters before the one at fault apart.
        """
        self._check_attached("save_pretrained")
        if format not in FILE_FORMATS:
            raise ValueError(
                f"save_pretrained: expected format as one of {', '.join(FILE_FORMATS)}, got "
                f"{format!r:.80}"
            )
        for name in self._selected(selected_adapters, state_dict is not None):
            folder = directory if name == DEFAULT else Path(directory) / name
            with self._activated(name):
                self._save_active(folder, format, collapse_prefix, is_main_process, state_dict)

    def _selected(self, names: Sequence[str] | None, has_state: bool) -> Sequence[str]:
        """The adapters that are to be saved."""
        if names is None:
            return [self.active_adapter] if has_state else list(self.adapter_configs)
        names = [names] if isinstance(names, str) else names
        self._check_known("save_pretrained", names)
        if has_state and list(names) != [self.active_adapter]:
            raise ValueError(
                "save_pretrained: expected selected_adapters to be the active adapter, "
                f"{self.active_adapter!r}, whose values state_dict holds, got {', '.join(names)}; "
                "leave state_dict out, or set_adapter() another one"
            )
        return names

    def _save_active(
        self,
        directory: str | os.PathLike[str],
        format: str,
        collapse_prefix: bool,
        is_main_process: bool,
        state_dict: Mapping[str, Tensor] | None,
    ) -> None:
        """Writes the active adapter."""
        trained = self.trained_parameters()
        is_writer = is_main_process and is_writer_of(trained.values())
        if state_dict is None:
            added = self._added_rows()  # gathered by every process, as the others are
            tensors = whole(trained if added is None else {**trained, ADDED_ROWS: added})
        if not is_writer:
            return  # where accelerate's state may be empty
        if state_dict is not None:
            tensors = trained_of(state_dict, trained, ADDED_ROWS)
        config, rows = self.method_config, tensors.pop(ADDED_ROWS, None)
        if (collapse_prefix or format == PEFT) and self.prefix is not None:
            config, tensors = collapsed(config, tensors, self.prefix)
        if format == PEFT:
            with_rows = {} if rows is None else {ADDED_ROWS: rows}
            write_peft(directory, self.base_model, config, tensors | with_rows)
        else:
            save_adapter(directory, self.base_model, config, tensors, rows)

    def get_extra_state(self) -> Tensor:
        """The method and the base model's sizes, as bytes in the state: transformers.Trainer saves
        a model's state and nothing else of it, and `from_pretrained` opens that.
        """
        return state_entry(self.base_model, self.method_config, self._added_rows())

    def set_extra_state(self, state: Any) -> None:
        """Nothing: whether a state fits is for its names and shapes to say."""

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload adapter",
        revision: str | None = None,
        create_pr: bool = False,
        **options: Any,
    ) -> str:
        """Uploads the adapter and a card (README.md) to the hub, and never the base model.

        Args:
            repo_id: made if it is not there.
            options: for `save_pretrained`, such as ``format="peft"``.

        Returns:
            The commit's address.
        """
        return push(
            self,
            repo_id,
            private=private,
            token=token,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            options=options,
        )

    @classmethod
    def from_pretrained(
        cls,
        model: PreTrainedModel,
        directory: str | os.PathLike[str],
        is_trainable: bool = False,
        *,
        adapter_name: str = DEFAULT,
        revision: str | None = None,
    ) -> Self:
        """The base model with an adapter that `save_pretrained` wrote, a transformers.Trainer (its
        checkpoints and what its save_model leaves) or another library (`formats`). On an error the
        base model is as it was.

        Args:
            model: a model like the one the adapter was trained in, without a method.
            directory: a folder, or the id of a repository on the hub.
            is_trainable: whether training goes on; if not, nothing requires a gradient and the
                model is in evaluation.
            adapter_name: what the adapter is called beside others.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a damaged or cut file, another architecture, shape or method, or a number
                that is not finite.
            TypeError: no model but the name of one.
        """
        if isinstance(model, (str, os.PathLike)):
            raise TypeError(
                f"from_pretrained: expected the base model, got its name {os.fspath(model)!r}; "
                "load it with transformers' AutoModelForSequenceClassification, "
                "AutoModelForCausalLM, ..., or both with AutoPeltModelForSequenceClassification, "
                "AutoPeltModelForCausalLM, ...from_pretrained(folder)"
            )
        directory = local_folder(directory, revision)
        adapter = read_adapter(directory, model)
        check_size(model, adapter.config, adapter.tensors, directory)
        made = cls(model, adapter.config, adapter_name)
        try:
            made._fill(adapter, directory)
        except BaseException:
            made._take_out()
            if made._first_values is not None:
                made._first_values.put(model, keep_head=False)
            raise
        if not is_trainable:
            made.requires_grad_(False)
            made.eval()
        return made


def get_pelt_model(
    model: PreTrainedModel, config: MethodConfig, adapter_name: str = DEFAULT
) -> PeltModel:
    """Freezes a transformers model and puts a method into it.

    Args:
        model: of one of the families in `FAMILIES` (encoders such as BERT, decoders such as GPT-2
            and Llama, encoder-decoders such as T5 and BART), with any head (or none); for LoRA
            without gates of any family. It is changed in place; `PeltModel.remove` undoes that.
        config: such as ``UniPELTConfig.apl()`` or ``LoraConfig(r=4)``.
        adapter_name: what the adapter is called beside others (`PeltModel.add_adapter`).

    Raises:
        ValueError: an unknown family, what a family cannot have, a model with a method already in
            it, or sizes or targets that do not fit.
        TypeError: config is not a method's config.
    """
    return PeltModel(model, config, adapter_name)
