"""A plain transformers model out of a tuned one, where its weights can hold what was learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..methods import Parts
from ..methods.lora import TARGETS
from ..nn import ExpertLoRALinear, FusedLoRALinear, LoRALinear
from ..nn.original import is_transposed, sizes_of
from .pruning import pruned_weights
from .slots import Place, Slots, layers_of, stacks_of

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
        if isinstance(module, (LoRALinear, ExpertLoRALinear, FusedLoRALinear)):
            weights[name] = module.merged_weight()
    return weights


def why_not_mergeable(parts: Parts) -> str:
    """Why no weight of the base model can hold a method's parts, or nothing."""
    if parts.lora is not None and parts.lora.gated:
        return "gated LoRA, whose scale is another one for each sentence"
    if parts.adapter is not None:
        return "an adapter, which is not linear"
    if parts.vlm is not None or parts.has_parallel_adapter:
        return "adapters of tasks, which are not linear"
    if parts.prefix is not None or parts.hyper is not None:
        return "a prefix, whose keys and values stand beside those of the tokens"
    if parts.mixture is not None and parts.mixture.kind == "adapter":
        return "AdaMix's adapters, which are not linear; merge_experts makes one of them"
    return ""


def matrices_of(model: PreTrainedModel) -> list[Matrix]:
    """The Linears of a plain encoder's layers and their zeros, layer by layer.

    Raises:
        ValueError: a model of no known family.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found: list[tuple[int, str, nn.Module, Place]] = []
    number = 0
    for slots in stacks_of(model):
        for layer in layers_of(model, slots):
            for place_name, place in _projections(slots):
                found.append((number, place_name, layer.get_submodule(place.path), place))
            number += 1
    weights = [_rows_of(linear, place) for _, _, linear, place in found]
    # One wait for the device for all of them.
    zeros = torch.stack([(weight == 0).sum() for weight in weights]).tolist()
    return [
        Matrix(number, place_name, names[id(linear)], count, weight.numel())
        for (number, place_name, linear, _), weight, count in zip(
            found, weights, zeros, strict=True
        )
    ]


def _projections(slots: Slots) -> list[tuple[str, Place]]:
    return [named for target in TARGETS for named in slots.places(target)]


def _rows_of(linear: nn.Module, place: Place) -> Tensor:
    """The part of a Linear's weight that is one projection's."""
    weight: Any = linear.weight
    size = sizes_of(linear)[1] // place.parts
    return weight.narrow(1 if is_transposed(linear) else 0, place.part * size, size)
