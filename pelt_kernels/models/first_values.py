"""Which parameters are trained in place, the values they had before, and their way back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..methods import Parts
from ..nn.quantised import is_quantised
from .vocabulary import vocabulary_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def head_names(model: PreTrainedModel) -> frozenset[str]:
    """The parameters outside the encoder. What gives each word its logit is none: it is the
    language model's, tied to the embeddings or not.
    """
    inside = {id(parameter) for parameter in model.base_model.parameters()}
    words = model.get_output_embeddings()
    if words is not None:
        inside.add(id(words.weight))
    return frozenset(
        name for name, parameter in model.named_parameters() if id(parameter) not in inside
    )


def names_in_place(
    model: PreTrainedModel, parts: Parts, head: Collection[str], others: Collection[str] = ()
) -> list[str]:
    """The parameters of the base model that a method trains: these others, too.

    Raises:
        ValueError: its biases, and its layers have none; or a quantised weight.
    """
    has_biases = any(name.endswith("bias") for name, _ in model.base_model.named_parameters())
    if parts.tune == "bias" and not has_biases:
        raise ValueError(
            "BitFitConfig: expected a model with biases, got "
            f"{type(model).__name__}, whose layers have none; use another method"
        )
    tunes_biases = parts.tune == "bias" or (parts.lora is not None and parts.lora.bias == "all")
    norms = norm_names(model) if parts.tune_norms else frozenset()
    in_place = [
        name
        for name, _ in model.named_parameters()
        if (name in head and parts.tune_head)
        or parts.tune == "all"
        or (tunes_biases and name.endswith("bias"))
        or (parts.tune_norms and name in norms)
        or name in others
    ]
    _check_trainable(model, in_place)
    return in_place


def _check_trainable(model: PreTrainedModel, names: Collection[str]) -> None:
    """Raises ValueError where one of the parameters is a quantised weight."""
    held = {f"{name}.weight": m for name, m in model.named_modules() if is_quantised(m)}
    quantised = [name for name in names if name in held]
    if quantised:
        raise ValueError(
            "get_pelt_model: expected floating-point weights where the base model is trained in "
            f"place, got {quantised[0]} quantised in {type(held[quantised[0]]).__name__}; use a "
            "method that leaves it alone, or, of a head, load the base model with it left out of "
            "the quantisation (BitsAndBytesConfig(llm_int8_skip_modules=[...]))"
        )


def norm_names(model: PreTrainedModel) -> frozenset[str]:
    """The parameters of a model's norms, whatever their class."""
    return frozenset(
        f"{name}.{own}" if name else own
        for name, module in model.named_modules()
        if "Norm" in type(module).__name__
        for own, _ in module.named_parameters(recurse=False)
    )


class FirstValues:
    """What some parameters of a model held when this was made.

    Args:
        names: those that will be trained in place.
        head: those of the model's head, with which `keep_head` leaves things as they are.
    """

    def __init__(
        self, model: PreTrainedModel, names: Collection[str], head: Collection[str]
    ) -> None:
        named = dict(model.named_parameters())
        self.values = {name: _copied(named[name]) for name in names}
        self._head = frozenset(head)
        self._vocabulary = vocabulary_of(model)

    def add(self, name: str, parameter: Tensor) -> None:
        """One more parameter, which is about to be changed; one that is known stays as it was."""
        self.values.setdefault(name, _copied(parameter))

    def check(self, model: PreTrainedModel, who: str, keep_head: bool) -> None:
        """Raises ValueError where a parameter cannot have its first value back: it is gone, or has
        another shape for another reason than a vocabulary that was resized since.
        """
        named = dict(model.named_parameters())
        words = vocabulary_of(model)
        for name, value in self._wanted(keep_head).items():
            now = named[name].shape if name in named else None
            is_resized = now == (words, *value.shape[1:]) and len(value) == self._vocabulary
            if now != value.shape and not is_resized:
                raise ValueError(
                    f"{who}: expected {name} {list(value.shape)} as the method met it, got "
                    f"{'none' if now is None else list(now)}; put it back, or use "
                    "remove(keep_head=True), which leaves a head as it is"
                )

    def put(self, model: PreTrainedModel, keep_head: bool) -> dict[str, Tensor]:
        """Gives the parameters their first values; returns those that they had."""
        wanted = self._wanted(keep_head)
        named = dict(model.named_parameters())
        trained = {name: named[name].detach().clone() for name in wanted}
        put_values(model, wanted)
        return trained

    def _wanted(self, keep_head: bool) -> dict[str, Tensor]:
        return {n: v for n, v in self.values.items() if not (keep_head and n in self._head)}


def _copied(parameter: Tensor) -> Tensor:
    """A copy of a parameter that takes no space on the accelerator."""
    return parameter.detach().clone() if parameter.is_meta else parameter.detach().cpu().clone()


@torch.no_grad()
def put_values(model: PreTrainedModel, values: Mapping[str, Tensor]) -> None:
    """Copies values into the parameters of the same names; of a resized vocabulary the words that
    both have.
    """
    named = dict(model.named_parameters())
    for name, value in values.items():
        parameter = named[name]
        if parameter.shape == value.shape:
            parameter.copy_(value)
        else:
            parameter[: len(value)].copy_(value[: len(parameter)])
