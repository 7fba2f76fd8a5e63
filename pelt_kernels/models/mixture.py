"""AdaMix in a model: the two passes of a training step."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..methods import AdaMixConfig
from ..ops import symmetric_kl

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def compares_passes(model: PreTrainedModel, config: AdaMixConfig) -> bool:
    """Whether training may compare two passes. Where it is known that there is nothing to compare,
    this is said once, when the model is made.
    """
    if not config.consistency or config.experts == 1:
        return False
    if getattr(model.config, "num_labels", None) == 1 or _is_regression(model):
        warnings.warn(
            "AdaMixConfig: the consistency loss of a regression is 0; training makes one pass over "
            "each batch and leaves it out",
            stacklevel=5,
        )
    return True


def consistent_forward(
    model: PreTrainedModel, consistency: float, args: tuple[Any, ...], inputs: dict[str, Any]
) -> Any:
    """The model's own outputs of a first pass over the batch, to whose loss ``c ·
    symmetric_kl(z1, z2)`` with the logits z2 of a second pass is added.

    Without labels there is no loss to add it to: warns, because the consistency is left out then.

    Raises:
        ValueError: a model that has a loss but no logits to compare.
    """
    wants_dict = inputs.pop("return_dict", None)
    if wants_dict is None:
        wants_dict = model.config.return_dict
    outputs = model(*args, **inputs, return_dict=True)
    if getattr(outputs, "loss", None) is None:
        if torch.is_grad_enabled():
            warnings.warn(
                "AdaMixConfig: a forward in training without labels leaves the consistency loss "
                "out; a Trainer with label_smoothing_factor or compute_loss_func takes the labels "
                "away before the model sees them. Set consistency=0 for a loss of your own",
                stacklevel=5,
            )
    elif not _has_nothing_to_compare(model, outputs):
        if not {"logits", "start_logits"} & outputs.keys():
            raise ValueError(
                "AdaMixConfig: expected a model that classifies sentences, tokens or answers for "
                f"the consistency loss, got {type(model).__name__}, whose outputs are "
                f"{', '.join(outputs)}; use consistency=0 for it"
            )
        second = model(*args, **inputs, return_dict=True)
        divergence = _divergence(model, outputs, second, inputs.get("labels"))
        outputs["loss"] = outputs["loss"] + consistency * divergence
    return outputs if wants_dict else outputs.to_tuple()


def _is_regression(model: PreTrainedModel) -> bool:
    return getattr(model.config, "problem_type", None) == "regression"


def _has_nothing_to_compare(model: PreTrainedModel, outputs: Any) -> bool:
    """A regression, whose logits are no distribution over classes; or one class."""
    logits = getattr(outputs, "logits", None)
    return _is_regression(model) or (logits is not None and logits.shape[-1] == 1)


def _divergence(model: PreTrainedModel, first: Any, second: Any, labels: Tensor | None) -> Tensor:
    """The symmetric divergence between the two passes' distributions over classes, averaged as the
    model averages its loss: over sentences, over tokens that have a label, over the labels where
    several may be right (each is a yes or no), over the start and the end of an answer. A decoder's
    logits are for the next token; behind an encoder the decoder reads the labels moved by one
    already, so there each token's logits are for its own label.
    """
    if "logits" not in first:
        names = ("start_logits", "end_logits")
        return torch.stack([symmetric_kl(first[name], second[name]) for name in names]).mean()
    z1, z2 = first["logits"], second["logits"]
    if getattr(model.config, "problem_type", None) == "multi_label_classification":
        # A sigmoid is the softmax of a logit and 0.
        pairs = [torch.stack([z, torch.zeros_like(z)], dim=-1) for z in (z1, z2)]
        return symmetric_kl(*pairs)
    if labels is None:
        return symmetric_kl(z1, z2)
    if model.can_generate() and not model.config.is_encoder_decoder:
        z1, z2, labels = z1[:, :-1], z2[:, :-1], labels[:, 1:]
    return symmetric_kl(z1, z2, (labels != -100).reshape(z1.shape[:-1]))
