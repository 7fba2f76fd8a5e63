"""A transformers model inside a module that is called like it and looks like it to others, and
whose state is what is trained and what no file of the model holds.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..nn.original import stands_for_quantised
from ..nn.quantised import entries
from .adapter_files import STATE_ENTRY
from .attention_config import viewed
from .forwarded import refusal
from .sharded import TrainedState
from .vocabulary import ADDED_ROWS, check_count, held_words, vocabulary_of, word_embeddings

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Self

BASE = "base_model."  # how the names of the model's own parameters begin
_made: dict[tuple[Any, Any, tuple[str, ...]], Any] = {}


class LoadResult(NamedTuple):
    """What `load_state_dict` found, as torch's own result."""

    missing_keys: list[str]
    unexpected_keys: list[str]


class WrappedModel(nn.Module):
    """Forwards calls and attributes to the model it holds, methods as `forwarded` has them.

    Its class is made for that model's: `shown_as` says what others read from it.

    Attributes:
        base_model: the model.
    """

    SHOWN: ClassVar[tuple[type, type, tuple[str, ...]]]  # of the class that `shown_as` made

    def __new__(cls, model: Any = None, *args: Any, **kwargs: Any) -> Self:
        has_forward = hasattr(type(model), "forward") and not hasattr(cls, "SHOWN")
        if not has_forward:
            return super().__new__(cls)
        made: Self = super().__new__(shown_as(cls, type(model), cls._inputs(*args, **kwargs)))
        return made

    @classmethod
    def _inputs(cls, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        """The names of what `forward` takes beside the base model's arguments, of an object that is
        made of these further arguments.
        """
        return ()

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.base_model = model
        self._trained: tuple[str, ...] = ()  # names of parameters, in their order
        self._held_words = held_words(model)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made for the base model's, so its name alone would not find it again.
        return empty, type(self).SHOWN, self.__dict__

    def _get_name(self) -> str:
        # transformers.Trainer asks by it whether labels stand for the next token.
        return type(self.base_model).__name__

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # While a copy or a pickle is being filled there is no model yet to ask.
            if name == "base_model" or "base_model" not in self.__dict__.get("_modules", {}):
                raise
            reason = refusal(self.base_model, name)
            if reason:
                raise AttributeError(reason) from None
            return getattr(self.base_model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward, its arguments and its outputs."""
        return self.base_model(*args, **kwargs)

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
        """Whether the base model's loss takes num_items_in_batch; transformers.Trainer asks."""
        model = self.base_model
        if hasattr(model, "accepts_loss_kwargs"):
            return bool(model.accepts_loss_kwargs)
        parameters = inspect.signature(model.forward).parameters.values()
        return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)

    @property
    def _hf_peft_config_loaded(self) -> bool:
        """Whether there is more than the base model: transformers.Trainer, which trains nothing in
        a quantised one, asks for PEFT's adapters by this name.
        """
        return True

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

    def _set_trained(self, names: Container[str]) -> None:
        """Only these are trained, from here on."""
        self._trained = tuple(name for name, _ in self.named_parameters() if name in names)

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """The method's parts and the head by name, whether they require a gradient now or not."""
        named = dict(self.named_parameters())
        return {name: named[name] for name in self._trained}

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """The numbers of parameters that require a gradient, and of all, quantised ones too."""
        parameters = list(self.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(map(entries, parameters))

    def state_dict(  # type: ignore[override]
        self, *args: Any, frozen: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """What is trained, by parameter name, and the word embeddings' rows that are in no file of
        the base model's; with ``frozen`` all of its weights.

        transformers.Trainer saves a model's state_dict, so its checkpoints hold what is trained and
        nothing else but what says of which method it is (`PeltModel.get_extra_state`).

        Raises:
            ValueError: with ``frozen``, weights are quantised, whose scales have no place in it.
        """
        if frozen and any(map(stands_for_quantised, self.modules())):
            raise ValueError(
                "state_dict: expected frozen=True of a base model with floating-point weights, got "
                "quantised ones; save the base model by itself (remove(), then its own "
                "save_pretrained)"
            )
        if not frozen and not args and kwargs.get("destination") is None:
            kwargs["destination"] = TrainedState()
            kwargs["destination"]._metadata = OrderedDict()  # as torch's own state has
        state = super().state_dict(*args, **kwargs)
        if not frozen:
            prefix = kwargs.get("prefix", "")
            trained = {prefix + name for name in (*self._trained, STATE_ENTRY)}
            others = [key for key in state if key.startswith(prefix) and key not in trained]
            for key in others:
                del state[key]
            if isinstance(state, TrainedState):
                state.frozen = frozenset(others)
            rows = self._added_rows()
            if rows is not None:
                state[prefix + ADDED_ROWS] = rows
        return state

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> LoadResult:
        """Loads what `state_dict` gives; names of the frozen base may be left out.

        Raises:
            RuntimeError: with ``strict``, a trained parameter is missing or a name is unknown; a
                shape differs.
        """
        rows = state_dict.get(ADDED_ROWS)
        if rows is not None:
            check_count(rows, self.base_model, self._held_words)
            state_dict = {key: state_dict[key] for key in state_dict if key != ADDED_ROWS}
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        missing = [name for name in result.missing_keys if name in self._trained]
        if strict and (missing or result.unexpected_keys):
            raise RuntimeError(
                "PeltModel.load_state_dict: expected every trained parameter and no other name, "
                f"got {len(missing)} missing "
                f"{missing[:3]} and {len(result.unexpected_keys)} unexpected "
                f"{result.unexpected_keys[:3]}"
            )
        self._put_rows(rows)
        return LoadResult(missing, list(result.unexpected_keys))

    def _added_rows(self) -> Tensor | None:
        """The rows of words beyond those that the base model's own files hold; None where there are
        none, or where the embeddings are trained as a whole.
        """
        added = self._added_words()
        if not added:
            return None
        # A copy: torch.save writes the whole memory of a view.
        return word_embeddings(self.base_model)[1].detach()[-added:].clone()

    def _added_words(self) -> int:
        """How many rows those are."""
        added = vocabulary_of(self.base_model) - self._held_words
        if added <= 0:
            return 0
        name, _ = word_embeddings(self.base_model)
        return 0 if BASE + name in self._trained else added

    def _put_rows(self, rows: Tensor | None) -> None:
        """Gives the last words a file's embeddings."""
        if rows is not None:
            _, weight = word_embeddings(self.base_model)
            with torch.no_grad():
                weight[-len(rows) :].copy_(rows)


def shown_as(kind: Any, base: Any, inputs: tuple[str, ...] = ()) -> Any:
    """A subclass of `kind` whose forward shows the signature of a base model's, with some inputs
    more, and whose name has that class's name in it.

    transformers.Trainer keeps the columns of a data set that ``forward`` names, takes those of them
    for labels that belong to the class, and knows question answering by the class's name.
    """
    if (kind, base, inputs) in _made:
        return _made[kind, base, inputs]
    call = kind.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call(self, *args, **kwargs)

    forward.__doc__ = call.__doc__
    forward.__signature__ = _with_inputs(  # type: ignore[attr-defined]
        inspect.signature(base.forward), inputs
    )
    members = {"forward": forward, "SHOWN": (kind, base, inputs)}
    members |= {"__doc__": kind.__doc__, "__module__": kind.__module__}
    _made[kind, base, inputs] = type(f"Pelt{base.__name__}", (kind,), members)
    return _made[kind, base, inputs]


def _with_inputs(signature: inspect.Signature, inputs: tuple[str, ...]) -> inspect.Signature:
    """The signature with arguments more, by keyword and None where they are left out."""
    parameters = list(signature.parameters.values())
    has_kwargs = parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    end = len(parameters) - has_kwargs
    parameters[end:end] = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in inputs
    ]
    return signature.replace(parameters=parameters)


def empty(kind: Any, base: Any, inputs: tuple[str, ...]) -> Any:
    """An object of that subclass that nothing has filled yet, as a copy and a pickle begin."""
    made = shown_as(kind, base, inputs)
    return made.__new__(made)
