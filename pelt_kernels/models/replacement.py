"""One module of the base model and the one that stands for it; which may be replaced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ..methods import Parts
from ..nn.original import why_not_replaceable
from .slots import Slots

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Replacement:
    """One module of the base model and the one that stands for it, which holds its weight and bias
    under the same names.
    """

    parent: nn.Module
    name: str
    original: nn.Module
    adapted: nn.Module

    def check_removable(self, who: str) -> None:
        """Raises ValueError where the original cannot have its parameters back."""
        held = self.adapted._parameters.keys() | self.adapted.__dict__.keys()
        missing = sorted({"weight", "bias"} - held)
        if missing:
            raise ValueError(
                f"{who}: expected {type(self.parent).__name__}.{self.name} with the parameters it "
                f"had when the method came, got {' and '.join(missing)} computed from others; take "
                "the parametrization or the pruning off first"
            )


def check_places(model: PreTrainedModel, layers: nn.ModuleList, slots: Slots, parts: Parts) -> None:
    """Raises ValueError unless every module that the parts replace, in every layer, may be
    replaced, with the first one's name; and where a hook holds the model's weights elsewhere.
    """
    for name, module in model.named_modules():
        is_empty = any(parameter.is_meta for parameter in module.parameters(recurse=False))
        if is_empty and hasattr(module, "_hf_hook"):
            raise ValueError(
                "get_pelt_model: expected a base model whose weights are in memory, got "
                f"{name} with weights that accelerate loads at each call; load it without "
                "offloading (accelerate.hooks.remove_hook_from_submodules)"
            )
    names = {id(module): name for name, module in model.named_modules()}
    for layer in layers:
        for path, kind in _places(slots, parts):
            module = layer.get_submodule(path)
            reason = why_not_replaceable(module, kind)
            if reason:
                raise ValueError(
                    f"get_pelt_model: expected {names[id(module)]} as an nn.{kind.__name__} with "
                    f"floating-point weight and bias, got {reason}"
                )


def _places(slots: Slots, parts: Parts) -> Iterator[tuple[str, type[nn.Module]]]:
    """The paths in a layer of what the parts replace, and what has to be there."""
    targets: list[str] = []
    if parts.lora is not None:
        targets += parts.lora.targets
    if parts.prefix is not None and parts.prefix.gated:
        targets.append("query")
    if parts.pruning is not None:
        targets += parts.pruning.targets
    if parts.mixture is not None:
        targets += ["ffn_out"] if parts.mixture.kind == "adapter" else parts.mixture.targets
    for target in targets:
        yield getattr(slots, target), nn.Linear
    if parts.adapter is not None:
        yield slots.ffn_norm, nn.LayerNorm
