"""A plain transformers model out of a tuned one, where its weights can hold what was learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..methods import Parts
from ..methods.lora import TARGETS
from ..nn import ExpertLoRALinear, LoRALinear
from .pruning import pruned_weights
from .slots import layers_of, slots_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Matrix(NamedTuple):
    """A Linear of a layer: the layer's number, its place (``query`` and so on), its name in the
    model, and how many of its entries are 0.
    """

    layer: int
    place: str
    name: str
    zeros: int
    entries: int

    @property
    def density(self) -> float:
        """The share of entries that are not 0."""
        return 1 - self.zeros / self.entries


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights in which each replaced Linear's parts are, by the Linear's name.

    Raises:
        ValueError: LoRA over 16-bit weights, which would round it away.
    """
    weights = pruned_weights(model)
    for name, module in model.named_modules():
        if isinstance(module, (LoRALinear, ExpertLoRALinear)):
            weights[name] = module.merged_weight()
    return weights


def why_not_mergeable(parts: Parts) -> str:
    """Why no weight of the base model can hold a method's parts, or nothing."""
    if parts.lora is not None and parts.lora.gated:
        return "gated LoRA, whose scale is another one for each sentence"
    if parts.adapter is not None:
        return "an adapter, which is not linear"
    if parts.prefix is not None:
        return "a prefix, whose keys and values stand beside those of the tokens"
    if parts.mixture is not None and parts.mixture.kind == "adapter":
        return "AdaMix's adapters, which are not linear; merge_experts makes one of them"
    return ""


def matrices_of(model: PreTrainedModel) -> list[Matrix]:
    """The Linears of a plain encoder's layers and their zeros, layer by layer.

    Raises:
        ValueError: a model of no known family.
    """
    slots = slots_of(model)
    names = {id(module): name for name, module in model.named_modules()}
    found: list[Any] = []
    for number, layer in enumerate(layers_of(model, slots)):
        for place in TARGETS:
            found.append((number, place, layer.get_submodule(slots.linear(place))))
    # One wait for the device for all of them.
    zeros = torch.stack([(linear.weight == 0).sum() for _, _, linear in found]).tolist()
    return [
        Matrix(number, place, names[id(linear)], count, linear.weight.numel())
        for (number, place, linear), count in zip(found, zeros, strict=True)
    ]
