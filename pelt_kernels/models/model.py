"""A transformers encoder with a method's parts in it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..methods import AdaMixConfig, MethodConfig, parts_of, with_part_changes
from ..nn import Bank
from .attention_config import viewed
from .checkpoint import BASE, Checkpointed, without_reparametrisation
from .export import Exportable
from .first_values import check_first_values, kept, put_values
from .inject import Injection, raise_occupied
from .mixture import compares_passes, consistent_forward
from .shown import empty, shown_as
from .slots import slots_of
from .vocabulary import held_words, vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainerCallback


class PeltModel(Exportable, Checkpointed):
    """A frozen transformers encoder, a method's parts inside it, and its trained classification
    head.

    Made by `get_pelt_model`. It is called like the model it holds (``base_model``, the very object
    it was given) and forwards attributes to it. Trained are the method's parts and the head, which
    is every parameter of the model outside transformers' ``model.base_model``: RoBERTa's dense
    layer and DistilBERT's pre_classifier belong to it, BERT's pooler does not.

    New parameters are float32 beside 16-bit weights, else they have the weights' dtype.
    `state_dict` holds what is trained; the frozen base is not part of a checkpoint
    (``state_dict(frozen=True)`` for everything).

    Attributes:
        base_model: the model, with the parts in it.
        method_config: the method's config.
        prefix: the prefixes of all layers (`pelt_kernels.nn.PrefixAttention`), or None.
    """

    def __init__(self, model: PreTrainedModel, config: MethodConfig) -> None:
        super().__init__()
        if not isinstance(config, MethodConfig):
            raise TypeError(
                "get_pelt_model: expected config as a method's config such as UniPELTConfig.apl(), "
                f"got {type(config).__name__}"
            )
        if isinstance(model, PeltModel):
            raise_occupied()
        parts = parts_of(config)
        slots = slots_of(model)
        named = dict(model.named_parameters())
        head = _head_names(model)
        if config.method == "head" and not head:
            raise ValueError(
                "HeadConfig: expected a model with a head, such as one for sequence "
                "classification, got "
                f"{type(model).__name__}, which has no parameter outside its encoder"
            )
        in_place = [
            name
            for name in named
            if (name in head and parts.tune_head)
            or parts.tune == "all"
            or (parts.tune == "bias" and "bias" in name)
        ]
        injection = Injection(model, slots, parts)
        self.base_model = model
        self.prefix = injection.prefix
        self._compares_passes = parts.mixture is not None and compares_passes(model, parts.mixture)
        self.method_config = config
        self._head = head
        self._requires_grad = {name: parameter.requires_grad for name, parameter in named.items()}
        self._first_values = (
            None if parts.tune == "all" else {name: kept(named[name]) for name in in_place}
        )
        self._vocabulary = vocabulary_of(model)
        self._held_words = held_words(model)
        self._injection = injection
        self._is_detached = False
        injection.attach()
        added = {
            name for name, _ in self.named_parameters() if name.removeprefix(BASE) not in named
        }
        trained = added | {BASE + name for name in in_place}
        self.requires_grad_(False)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in trained)
        self._trained = tuple(name for name, _ in self.named_parameters() if name in trained)

    SHOWN: ClassVar[tuple[type, type]]  # of the class that `shown_as` made

    def __new__(cls, model: Any = None, config: Any = None) -> PeltModel:
        has_forward = hasattr(type(model), "forward") and not hasattr(cls, "SHOWN")
        made: PeltModel = super().__new__(shown_as(cls, type(model)) if has_forward else cls)
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made for the base model's, so its name alone would not find it again.
        return empty, type(self).SHOWN, self.__dict__

    def _get_name(self) -> str:
        # transformers.Trainer asks by it whether labels stand for the next token.
        return type(self.base_model).__name__

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward: its arguments, which `inspect.signature` shows, and its
        outputs, as they are without a method.

        An attention_mask is [B, N], 1 for tokens, 0 for padding; None: no padding; the gates pool
        over tokens by it. With output_attentions=True the weights of a layer with a prefix are [B,
        H, S, P + S], prefix columns first. AdaMix in training makes two passes and adds its
        consistency to the loss, see `AdaMixConfig`.

        Raises:
            ValueError: a mask of another shape; PST in training where nothing says how far the
                training is (`set_progress`, `callbacks`).
        """
        if self.base_model.training and not self._is_detached:
            self._check_progress()
            mixture = parts_of(self.method_config).mixture
            if mixture is not None and self._compares_passes:
                return consistent_forward(self.base_model, mixture.consistency, args, kwargs)
        return self.base_model(*args, **kwargs)

    def callbacks(self) -> list[TrainerCallback]:
        """What a transformers.Trainer needs to train the method as its paper does, for its
        ``callbacks``: PST's sparsity, AdaMix's care of experts that were not drawn. Empty for other
        methods.
        """
        # transformers' Trainer takes seconds to import, which only training needs.
        from .callbacks import SparedExperts, SparsitySchedule

        parts = parts_of(self.method_config)
        made: list[TrainerCallback] = []
        if parts.pruning is not None:
            made.append(SparsitySchedule(self))
        if parts.mixture is not None:
            made.append(SparedExperts(self))
        return made

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # While a copy or a pickle is being filled there is no model yet to ask.
            if name == "base_model" or "base_model" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.base_model, name)

    @property
    def config(self) -> Any:
        """The base model's configuration; the method's is `method_config`."""
        return viewed(self.base_model.config)

    @property
    def device(self) -> torch.device:
        """Where the base model is."""
        return self.base_model.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base model's weights."""
        return self.base_model.dtype

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether the base model's loss takes num_items_in_batch; transformers.Trainer asks. A
        consistency, which is a mean over the batch, does not.
        """
        model = self.base_model
        if self._compares_passes:
            return False
        if hasattr(model, "accepts_loss_kwargs"):
            return bool(model.accepts_loss_kwargs)
        parameters = inspect.signature(model.forward).parameters.values()
        return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Keeps only the layers' inputs. Reentrant or not, gradients and dropout stay the same.

        Args:
            gradient_checkpointing_kwargs: for `torch.utils.checkpoint`, such as ``use_reentrant``.
            options: further ones of the base model, such as ``every_n_layers``.
        """
        model = self.base_model
        enable = getattr(model, "activation_checkpointing_enable", None)
        enable = enable or model.gradient_checkpointing_enable
        enable(gradient_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        """Keeps activations again."""
        model = self.base_model
        (
            getattr(model, "activation_checkpointing_disable", None)
            or model.gradient_checkpointing_disable
        )()

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """The numbers of parameters that require a gradient, and of all."""
        parameters = list(self.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(
            p.numel() for p in parameters
        )

    def print_trainable_parameters(self) -> None:
        """Prints both numbers and their ratio."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,} || all params: {total:,} || trainable%: "
            f"{100 * trainable / total:.4f}"
        )

    def record_gates(self, enabled: bool = True) -> None:
        """Keeps the gates of the latest forward for `gate_values`, or stops. Off by default."""
        for state in self._injection.states:
            state.is_recording = enabled
            state.gate_values = {}

    def gate_values(self) -> dict[tuple[int, str], Tensor]:
        """The gates of the latest forward while `record_gates` was on: (layer, kind) -> [B],
        float32, on the device.

        Kinds: ``adapter``, ``prefix``, ``lora_query``, ``lora_value`` and so on, as far as they are
        gated. Nothing waits for the device and nothing accumulates: the next forward replaces the
        tensors.
        """
        return {
            (state.number, kind): value
            for state in self._injection.states
            for kind, value in state.gate_values.items()
        }

    def collapse_prefix(self) -> None:
        """Replaces the prefix's reparametrisation by the keys and values it computes: the same
        attention for less work.

        For inference: what is saved afterwards cannot resume training of the reparametrisation, and
        an optimizer made before holds parameters that are gone.

        Raises:
            ValueError: the method has no prefix.
        """
        if self.prefix is None:
            raise ValueError(
                "collapse_prefix: expected a method with a prefix, got "
                f"{self.method_config.method!r}"
            )
        self.prefix.collapse()
        self.method_config = without_reparametrisation(self.method_config)
        named = [name for name, _ in self.named_parameters()]
        kept = set(self._trained) | {name for name in named if name.startswith("prefix.")}
        self._trained = tuple(name for name in named if name in kept)

    def merge_experts(self) -> None:
        """Replaces AdaMix's experts by their average, a single adapter: the evaluation's logits bit
        for bit, with the memory of one. What is saved afterwards is that adapter.

        An optimizer made before holds parameters that are gone.

        Raises:
            ValueError: the method has no experts.
        """
        if parts_of(self.method_config).mixture is None:
            raise ValueError(
                "merge_experts: expected the method 'adamix', alone or as a part, got "
                f"{self.method_config.method!r}"
            )
        self._check_attached("merge_experts")
        for module in self.modules():
            if isinstance(module, Bank):
                module.merge()
        self.method_config = with_part_changes(self.method_config, AdaMixConfig, experts=1)
        self._compares_passes = False

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the model computes what the untouched base model computes, with the trained head
        left in place.

        The parts are out of the model meanwhile, so do not train, save or copy it inside.

        Raises:
            ValueError: the method is full fine-tuning, which has no untouched base.
        """
        self._check_has_base("disable_adapter")
        if self._is_detached:
            yield
            return
        self._injection.check_detachable("disable_adapter")
        self._check_first_values("disable_adapter", keep_head=True)
        self._injection.detach()
        self._is_detached = True
        trained_values = self._put_first_values(keep_head=True)
        try:
            yield
        finally:
            self._put(trained_values)
            self._injection.attach()
            self._is_detached = False

    def remove(self, keep_head: bool = False) -> PreTrainedModel:
        """Takes the method out and gives back the very base model, bit for bit as it was: its
        modules, configuration, attention implementation, weights and requires_grad flags. This
        object is of no use afterwards.

        Args:
            keep_head: leave the trained head on it. By default the head, too, has the values it
                came with; where `resize_token_embeddings` changed it since, the words that it came
                with.

        Raises:
            ValueError: the method is full fine-tuning, which has no untouched base;
                ``model.base_model`` is its result. Or a parameter has another shape now, or is
                computed from others; the model is as it was.
        """
        self._check_has_base("remove")
        self._check_attached("remove")
        self._injection.check_detachable("remove")
        self._check_first_values("remove", keep_head)
        self._take_out(keep_head=keep_head)
        return self.base_model

    def _take_out(self, keep_head: bool = False, keep_trained: bool = False) -> None:
        """Leaves the base model; what was trained in place keeps its values where asked to."""
        self._injection.detach()
        self._is_detached = True
        if not keep_trained:
            self._put_first_values(keep_head=keep_head)
        for name, parameter in self.base_model.named_parameters():
            parameter.requires_grad_(self._requires_grad.get(name, parameter.requires_grad))
            parameter.grad = None

    def _put_first_values(self, keep_head: bool) -> dict[str, Tensor]:
        """Gives parameters trained in place their first values; returns the trained ones."""
        wanted = self._wanted_values(keep_head)
        named = dict(self.base_model.named_parameters())
        trained = {name: named[name].detach().clone() for name in wanted}
        self._put(wanted)
        return trained

    def _wanted_values(self, keep_head: bool) -> dict[str, Tensor]:
        first = self._first_values or {}
        return {n: value for n, value in first.items() if not (keep_head and n in self._head)}

    def _check_first_values(self, who: str, keep_head: bool) -> None:
        wanted = self._wanted_values(keep_head)
        check_first_values(self.base_model, wanted, self._vocabulary, who)

    def _put(self, values: dict[str, Tensor]) -> None:
        put_values(self.base_model, values)

    def _check_has_base(self, who: str) -> None:
        if self._first_values is None:
            raise ValueError(
                f"{who}: expected a method that leaves the base model alone, got "
                f"{self.method_config.method!r}, which "
                "trains it in place; keep a copy of the model, or load it again"
            )


def get_pelt_model(model: PreTrainedModel, config: MethodConfig) -> PeltModel:
    """Freezes a transformers encoder and puts a method into it.

    Args:
        model: BERT, RoBERTa, XLM-R, CamemBERT, DistilBERT, ELECTRA or one of the same shape, with
            any head (or none). It is changed in place; `PeltModel.remove` undoes that.
        config: such as ``UniPELTConfig.apl()`` or ``LoraConfig(r=4)``.

    Raises:
        ValueError: an unknown family, a gate in a decoder, a model with a method already in it, or
            sizes that do not fit.
        TypeError: config is not a method's config.
    """
    return PeltModel(model, config)


def _head_names(model: PreTrainedModel) -> frozenset[str]:
    """The parameters outside the encoder; a decoder tied to the embeddings is inside."""
    inside = {id(parameter) for parameter in model.base_model.parameters()}
    return frozenset(
        name for name, parameter in model.named_parameters() if id(parameter) not in inside
    )
