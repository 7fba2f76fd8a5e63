"""A PeftModel whose prefixes go to `prefix_attention`, one class for each of PEFT's.

PEFT puts a prefix into the cache of a forward, a copy for each sentence, and attention joins it to
the tokens' keys. Here the model is handed a cache that holds nothing and says where the tokens'
positions begin, so positions are PEFT's, and the prefix goes to the layers' attention as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import peft
import torch
from peft import PeftModel
from torch import nn
from transformers import EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer

from ..models.attention_config import configs_of
from .peft_prefix_attention import (
    ARGUMENT,
    ROW,
    PrefixCall,
    PrefixPositions,
    attention_name,
    base_name,
    in_flight,
)
from .replacement import Accelerated, library_class


class _Prefixed(Accelerated):
    """A PeftModel whose prefixes go to `prefix_attention`.

    Which adapter is active, and all of its values, are read from PEFT's own state at each forward.
    `generate` is PEFT's own, in whose cache the prefix is once.

    Attributes:
        pelt_layers: how many attentions have a prefix.
        pelt_cache_argument: under which the model takes a cache; "" where it takes none.
        pelt_window: the most keys before a query that it sees; 0: all.
    """

    pelt_layers: int
    pelt_cache_argument: str
    pelt_window: int

    def pelt_attach(self) -> None:
        """Numbers the attentions, and names the attention function in the model's configs."""
        _drop_own_methods(self)
        base: Any = self.base_model  # type: ignore[attr-defined]
        attentions = attentions_of(base)
        self.pelt_layers, self.pelt_window = len(attentions), window_of(attentions)
        self.pelt_cache_argument = cache_argument(base)
        for row, module in enumerate(attentions):
            setattr(module, ROW, row)
        for layer in _layers(base):
            layer._can_checkpoint_with_cache = True
        for config in configs_of(base):
            config._attn_implementation_internal = attention_name(
                base_name(config._attn_implementation_internal)
            )

    def pelt_detach(self) -> None:
        """Undoes `pelt_attach`."""
        _drop_own_methods(self)
        base: Any = self.base_model  # type: ignore[attr-defined]
        for module in base.modules():
            module.__dict__.pop(ROW, None)
        for layer in _layers(base):
            layer.__dict__.pop("_can_checkpoint_with_cache", None)
        for config in configs_of(base):
            config._attn_implementation_internal = base_name(config._attn_implementation_internal)
        for name in ("pelt_layers", "pelt_cache_argument", "pelt_window"):
            self.__dict__.pop(name, None)

    def pelt_forward(self, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`forward`, which is PEFT's, with the prefixes on their way to the layers' attention.

        It gives no cache to go on from, unless use_cache=True asks for one: that one is PEFT's, in
        which the prefix is.
        """
        model: Any = self
        config = model.active_peft_config
        goes_own_way = kwargs.get("use_cache") or why_not(config, model, self.pelt_layers)
        if self.pelt_window and not goes_own_way:
            keys = config.num_virtual_tokens + _tokens(args, kwargs).shape[1]
            goes_own_way = keys > self.pelt_window
        if goes_own_way:
            return forward(self, *args, **kwargs)
        base = model.base_model
        call = PrefixCall(
            model.prompt_encoder[model.active_adapter],
            config,
            self.pelt_backend,
            base.config.is_encoder_decoder,
            _relative(base),
            bool(kwargs.get("output_attentions") or base.config.output_attentions),
        )
        if not self.pelt_cache_argument and kwargs.get("position_ids") is None:
            # PEFT adds P to positions that are given, which a cache does where there is one.
            ids = _tokens(args, kwargs)
            kwargs["position_ids"] = torch.arange(ids.shape[1], device=ids.device)[None]
        # PEFT's forward for answers names these and hands them to no one.
        for name in ("token_type_ids", "position_ids"):
            if kwargs.get(name) is not None:
                call.inputs[name] = kwargs[name]
        before, in_flight.call = in_flight.call, call
        try:
            return forward(self, *args, **(kwargs | {"use_cache": False, ARGUMENT: call}))
        finally:
            in_flight.call = before

    def get_prompt(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's cache with the prefix; in a forward with prefixes one that holds nothing."""
        call = in_flight.call
        if call is None:
            return super().get_prompt(*args, **kwargs)  # type: ignore[misc]
        if not self.pelt_cache_argument or call.relative is not None:
            return None
        cache = PrefixPositions(call.length)
        return EncoderDecoderCache(cache, PrefixPositions(0)) if call.has_two_stacks else cache

    def _prefix_tuning_forward(self, **kwargs: Any) -> Any:
        """What PEFT's models with a head call. PEFT computes the head itself where it finds no
        argument for a cache in the model's forward, and refuses encoders; here the model does it.
        """
        call = in_flight.call
        if call is None:
            return super()._prefix_tuning_forward(**kwargs)  # type: ignore[misc]
        if self.pelt_cache_argument:
            kwargs[self.pelt_cache_argument] = self.get_prompt()
        for name, value in call.inputs.items():
            is_position = name == "position_ids"
            kwargs.setdefault(name, value + call.length if is_position else value)
        model: Any = self
        return model.base_model(**kwargs)


class _Writing(_Prefixed):
    """A PeftModel that also generates."""

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's, under the name that the model has for a cache: PEFT looks for it, and puts its
        own, under transformers' former one, which a model that is given both does not read.
        """
        state, name = self.__dict__, "base_model_prepare_inputs_for_generation"
        prepare, is_renamed = state[name], False

        def prepare_for_peft(*args: Any, **kwargs: Any) -> Any:
            nonlocal is_renamed
            inputs = prepare(*args, **kwargs)
            is_renamed = "cache" in inputs
            if is_renamed:
                inputs["past_key_values"] = inputs.pop("cache")
            return inputs

        state[name] = prepare_for_peft
        try:
            inputs = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        finally:
            state[name] = prepare
        if is_renamed:
            inputs["cache"] = inputs.pop("past_key_values")
        return inputs


def _forward_of(kind: type[PeftModel]) -> Callable[..., Any]:
    """A forward with the signature of PEFT's, by which trainers choose columns."""

    @wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.pelt_forward(kind.forward, args, kwargs)

    return forward


class AcceleratedPrefixCausalLM(_Writing, peft.PeftModelForCausalLM):  # type: ignore[misc]
    """A model that writes."""

    forward = _forward_of(peft.PeftModelForCausalLM)


class AcceleratedPrefixSeq2SeqLM(_Writing, peft.PeftModelForSeq2SeqLM):  # type: ignore[misc]
    """An encoder with a decoder."""

    forward = _forward_of(peft.PeftModelForSeq2SeqLM)


class AcceleratedPrefixFeatureExtraction(_Prefixed, peft.PeftModelForFeatureExtraction):
    """A model without a head."""

    forward = _forward_of(peft.PeftModelForFeatureExtraction)


class AcceleratedPrefixSequenceClassification(  # type: ignore[misc]
    _Prefixed, peft.PeftModelForSequenceClassification
):
    """A model that labels sentences."""

    forward = _forward_of(peft.PeftModelForSequenceClassification)


class AcceleratedPrefixTokenClassification(  # type: ignore[misc]
    _Prefixed, peft.PeftModelForTokenClassification
):
    """A model that labels tokens."""

    forward = _forward_of(peft.PeftModelForTokenClassification)


class AcceleratedPrefixQuestionAnswering(  # type: ignore[misc]
    _Prefixed, peft.PeftModelForQuestionAnswering
):
    """A model that marks answers."""

    forward = _forward_of(peft.PeftModelForQuestionAnswering)


CLASSES: dict[type[nn.Module], type[nn.Module]] = {
    kind.__bases__[-1]: kind
    for kind in (
        AcceleratedPrefixCausalLM,
        AcceleratedPrefixSeq2SeqLM,
        AcceleratedPrefixFeatureExtraction,
        AcceleratedPrefixSequenceClassification,
        AcceleratedPrefixTokenClassification,
        AcceleratedPrefixQuestionAnswering,
    )
}


def why_not(config: Any, model: Any, layers: int) -> str:
    """Why an adapter goes PEFT's own way; empty where it does not."""
    stacks = 2 if model.base_model.config.is_encoder_decoder else 1
    if config.num_transformer_submodules != stacks:
        return (
            f"num_transformer_submodules is {config.num_transformer_submodules}, where PEFT's "
            f"default for the model is {stacks}"
        )
    if config.num_layers != layers:
        return f"num_layers is {config.num_layers}, and the model has {layers} attentions"
    return ""


def attentions_of(base: Any) -> list[Any]:
    """The attentions that get a prefix, in the order of the layers: of an encoder with a decoder
    the decoder's own, else all.
    """
    stack = base.get_decoder() if base.config.is_encoder_decoder else base
    return [module for module in stack.modules() if _has_prefix(module, base)]


def _has_prefix(module: Any, base: Any) -> bool:
    forward = inspect.unwrap(type(module).forward)
    if "ALL_ATTENTION_FUNCTIONS" not in forward.__code__.co_names:
        return False
    return bool(module.is_causal) or not base.config.is_encoder_decoder


def _layers(base: Any) -> list[Any]:
    """The layers that may be checkpointed with the cache they are handed: it holds nothing, and
    without this transformers would warn that it takes it away. The cache of an encoder with a
    decoder notes what was put in.
    """
    if base.config.is_encoder_decoder:
        return []
    return [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]


def has_own_forward(model: Any) -> bool:
    """Whether a model holds the forward of its own class: PEFT's disable_adapter() leaves it."""
    held = model.__dict__.get("forward")
    return getattr(held, "__func__", None) is type(model).forward and held.__self__ is model


def _drop_own_methods(model: Any) -> None:
    """After which a model has the methods of its class, and none that disable_adapter() left."""
    for name in ("forward", "prepare_inputs_for_generation"):
        function = getattr(model.__dict__.get(name), "__func__", None)
        kinds = (type(model), library_class(model))
        if function is not None and function in [getattr(kind, name, None) for kind in kinds]:
            del model.__dict__[name]


def cache_argument(base: Any) -> str:
    parameters = inspect.signature(base.base_model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in parameters), "")


def window_of(attentions: list[Any]) -> int:
    """The smallest window of a layer; 0: none has one."""
    windows = [
        getattr(module, "sliding_window", None) or getattr(module.config, "sliding_window", None)
        for module in attentions
    ]
    return min((window for window in windows if window), default=0)


def _relative(base: Any) -> Any:
    """The attention of a decoder that holds the relative positions of all its layers, or None."""
    if base.config.model_type not in ("t5", "mt5"):
        return None
    return next(each for each in attentions_of(base) if each.has_relative_attention_bias)


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What the model reads, [B, S] or [B, S, D]."""
    if args:
        return args[0]
    ids = kwargs.get("input_ids")
    return kwargs["inputs_embeds"] if ids is None else ids
