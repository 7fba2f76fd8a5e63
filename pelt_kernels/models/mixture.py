"""AdaMix in a model: where its experts stand, and the two passes of a training step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..methods import AdaMixConfig
from ..methods.adapter import bottleneck_of
from ..nn import ExpertAdapter, ExpertLoRALinear, Router
from ..ops import symmetric_kl
from .replacement import Replacement
from .slots import Slots, place_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ExpertLinear(nn.Module):
    """The FFN's second Linear and the experts on its output: ``f = x Wᵀ + b``, ``y = experts(f)``.

    weight and bias are the Linear's own parameters under the same names.
    """

    def __init__(self, base: nn.Linear, experts: ExpertAdapter) -> None:
        super().__init__()
        self.weight, self.bias = base.weight, base.bias
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        """y [B, S, D]."""
        y: Tensor = self.experts(nn.functional.linear(x, self.weight, self.bias))
        return y


def adapt_with_experts(
    layer: nn.Module, slots: Slots, config: AdaMixConfig, router: Router, made: dict[str, Any]
) -> Iterator[Replacement]:
    """The modules with experts that stand for a layer's own."""
    sizes = config.bank_sizes()
    if config.kind == "adapter":
        parent, name = place_of(layer, slots.ffn_out)
        original = getattr(parent, name)
        hidden_size = original.out_features
        experts = ExpertAdapter(
            hidden_size,
            bottleneck_of(config, hidden_size),
            sizes,
            router,
            activation=config.activation,
            dropout=config.dropout,
            **made,
        )
        yield Replacement(parent, name, original, ExpertLinear(original, experts))
        return
    for target in config.targets:
        parent, name = place_of(layer, getattr(slots, target))
        original = getattr(parent, name)
        adapted = ExpertLoRALinear(
            original,
            config.r,
            config.alpha,
            sizes,
            router,
            dropout=config.dropout,
            identical_start=config.identical_start,
            dtype=made["dtype"],
        )
        yield Replacement(parent, name, original, adapted)


def compares_passes(model: PreTrainedModel, config: AdaMixConfig) -> bool:
    """Whether training compares two passes. A regression's single logit has nothing to compare,
    which is said once, when the model is made.
    """
    if not config.consistency or config.experts == 1:
        return False
    if getattr(model.config, "num_labels", None) == 1:
        warnings.warn(
            "AdaMixConfig: the consistency loss of a model with one logit (a regression) is 0; "
            "training makes one pass over each batch and leaves it out",
            stacklevel=4,
        )
        return False
    return True


def consistent_forward(
    model: PreTrainedModel, router: Router, consistency: float, inputs: dict[str, Any]
) -> Any:
    """One call of the model on the batch twice over; the outputs' ``loss`` is ``CE(z1) + c ·
    symmetric_kl(z1, z2)`` and their ``logits`` are z1.

    Raises:
        ValueError: a model without ``logits``, or labels that are not those of a classification.
    """
    labels = inputs["labels"]
    first = next(inputs[name] for name in ("input_ids", "inputs_embeds") if name in inputs)
    batch = first.shape[0]
    doubled = {
        name: torch.cat([value, value])
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch
        else value
        for name, value in inputs.items()
        if name not in ("labels", "return_dict")
    }
    router.draw(passes=2, batch=batch)
    outputs = model(**doubled, return_dict=True)
    logits = getattr(outputs, "logits", None)
    if logits is None or labels.shape not in (logits[:batch].shape[:-1], logits[:batch].shape):
        raise ValueError(
            "AdaMixConfig: expected a model that classifies sentences or tokens for the consistency"
            f" loss, with labels [B] or [B, S], got {type(model).__name__} with labels"
            f" {list(labels.shape)}; use consistency=0 for it"
        )
    z1, z2 = logits[:batch], logits[batch:]
    outputs["loss"] = _cross_entropy(z1, labels) + consistency * symmetric_kl(
        z1, z2, _counted(z1, labels)
    )
    outputs["logits"] = z1
    return outputs


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    if labels.shape == logits.shape:  # several labels at once
        return nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))


def _counted(logits: Tensor, labels: Tensor) -> Tensor | None:
    """The rows whose label is not ignored; None for all."""
    return None if labels.shape == logits.shape else labels != -100
