"""A plain transformers model out of a tuned one, where its weights can hold what was learned."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..methods import Parts, parts_of
from ..methods.lora import TARGETS
from ..nn import ExpertLoRALinear, LoRALinear
from .pruning import Prunable
from .slots import layers_of, slots_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .inject import Injection


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


class Exportable(Prunable):
    """What `PeltModel` does to become a plain model."""

    if TYPE_CHECKING:
        _injection: Injection

    def why_not_dense(self) -> str:
        """Empty where `export_dense` can serve, else the reason it cannot, as one clause."""
        return why_not_mergeable(parts_of(self.method_config))

    @torch.no_grad()
    def export_dense(self) -> PreTrainedModel:
        """Takes the method out and leaves what was learned in the plain base model's weights: the
        same logits, without this package. This object is of no use afterwards.

        PST's pruned weights are written with their exact number of zeros, bit for bit what the
        forward used. LoRA becomes ``W + alpha / R · B A``, computed in float64 and rounded once;
        AdaMix's experts are averaged before. Biases and heads that were trained in place stay.

        Raises:
            ValueError: a part that no weight can hold (adapters, prefixes, gated LoRA), LoRA over
                16-bit weights, which would round it away, or a method that is not in the model.
        """
        self._check_attached("export_dense")
        refusal = self.why_not_dense()
        if refusal:
            raise ValueError(f"export_dense: expected parts that weights can hold, got {refusal}")
        self._injection.check_detachable("export_dense")
        weights = self._merged_weights()
        self._take_out(keep_trained=True)
        self._put({f"{name}.weight": weight for name, weight in weights.items()})
        return self.base_model

    def _merged_weights(self) -> dict[str, Tensor]:
        """The weights in which each replaced Linear's parts are, by the Linear's name."""
        weights = {}
        if parts_of(self.method_config).pruning is not None:
            weights = self._pruned_weights("export_dense")
        for name, module in self.base_model.named_modules():
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
