"""A training loss's term of the gates, which has them decide."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..methods import Parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .call import Call

_EDGE = 1e-6  # where the slope of the entropy is cut off, which has no bound at 0 and 1


def penalty_of(kind: str, gates: Sequence[Tensor]) -> Tensor:
    """The mean over all gates, [B] or [B, S] each, of ``-g ln g - (1 - g) ln(1 - g)`` (entropy), or
    of ``g`` (l1): a number, float32.
    """
    of_each = []
    for gate in gates:
        if kind == "entropy":
            g = gate.clamp(_EDGE, 1 - _EDGE)
            gate = torch.special.entr(g) + torch.special.entr(1 - g)
        of_each.append(gate.mean())
    return torch.stack(of_each).mean()


def penalised_forward(
    model: PreTrainedModel, parts: Parts, call: Call, args: tuple[Any, ...], inputs: dict[str, Any]
) -> Any:
    """The model's own outputs, to whose loss the penalty of this forward's gates is added.

    Without labels there is no loss to add it to: warns, because the penalty is left out then.
    """
    wants_dict = inputs.pop("return_dict", None)
    if wants_dict is None:
        wants_dict = model.config.return_dict
    with call.gathering() as gates:
        outputs = model(*args, **inputs, return_dict=True)
    if getattr(outputs, "loss", None) is None:
        warnings.warn(
            "UniPELTConfig: a forward in training without labels leaves gate_penalty out; a "
            "Trainer with label_smoothing_factor or compute_loss_func takes the labels away before "
            "the model sees them. Set gate_penalty=0 for a loss of your own",
            stacklevel=5,
        )
    else:
        penalty = penalty_of(parts.gate_penalty_kind, gates)
        outputs["loss"] = outputs["loss"] + parts.gate_penalty * penalty
    return outputs if wants_dict else outputs.to_tuple()
