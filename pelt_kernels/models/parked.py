"""An adapter that is in a model's care and not in the model: several adapters take turns in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from ..methods import MethodConfig
    from .first_values import FirstValues
    from .inject import Injection

# What of a PeltModel belongs to the adapter in it: its modules, and what is known about it.
MODULES = ("prefix", "tokens", "task_adapters", "written")
FIELDS = (
    "active_adapter",
    "method_config",
    "_task_inputs",
    "_compares_passes",
    "_first_values",
    "_injection",
    "_in_model",
    "_progress",
    "_trained",
)


class Parked(nn.Module):
    """What belongs to one adapter while another one is in the model, or none.

    Its modules are this one's children, so they move and change their dtype with the model. Nothing
    of it is trained. The base model's weights are not part of it.

    Attributes:
        fields: by the names in `FIELDS`.
        trainable: the names of the parameters that required a gradient while it was in the model.
        in_place: the names of the base model's parameters that it trains in place.
    """

    def __init__(
        self,
        fields: Mapping[str, Any],
        modules: Mapping[str, nn.Module | None],
        trainable: frozenset[str],
        in_place: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.fields, self.trainable = dict(fields), trainable
        for name, module in modules.items():
            self.register_module(name, module)
        self.stand_ins = nn.ModuleList([each.adapted for each in self.injection.replacements])
        self.in_place = tuple(in_place)
        self.values = nn.ParameterList(list(in_place.values()))
        self.requires_grad_(False)
        for parameter in self.parameters():
            parameter.grad = None

    @property
    def name(self) -> str:
        """The adapter's."""
        name: str = self.fields["active_adapter"]
        return name

    @property
    def method_config(self) -> MethodConfig:
        """The config of its method."""
        config: MethodConfig = self.fields["method_config"]
        return config

    @property
    def injection(self) -> Injection:
        """What puts it into the model."""
        injection: Injection = self.fields["_injection"]
        return injection

    @property
    def first_values(self) -> FirstValues:
        """What the base model held before."""
        first_values: FirstValues = self.fields["_first_values"]
        return first_values

    def values_in_place(self) -> dict[str, Tensor]:
        """What the base model's parameters hold while it is in the model."""
        return {name: value.detach() for name, value in zip(self.in_place, self.values)}
