"""The attention of a model with PEFT's LoRA: on a CPU by `prefix_attention` without a prefix, where
that takes less time than PyTorch's.
"""

from __future__ import annotations

from typing import Any

from peft import LoraModel

from ..models.attachment import Attachment
from ..models.attention_config import PELT_SDPA, configs_of
from ..models.sdpa import SDPA
from ..ops.prefix_attention.without_prefix import is_for_cpu
from .peft_families import why_unknown
from .replacement import Accelerated, Replacement

OPERATOR = "prefix_attention"
EXCEPTION = (
    "attention is PyTorch's in small calls, on other devices than a CPU, and beside a mask that is "
    "not causal, of padding, or both"
)


class AcceleratedLoraModel(Accelerated, LoraModel):
    """What PEFT puts LoRA's layers into a model with. Meanwhile the model reads its attention,
    "pelt_sdpa", in views of its configurations.
    """

    pelt_attention: Attachment

    def pelt_attach(self) -> None:
        """Shows the views to the model's modules."""
        self.pelt_attention = Attachment(self.model)
        self.pelt_attention.views = self.pelt_attention.make_views()
        self.pelt_attention.show_views()

    def pelt_detach(self) -> None:
        """The model keeps nothing of it."""
        self._take_off(self.__dict__.pop("pelt_attention"))

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        """PEFT's. Without its layers the model keeps nothing of this project either."""
        base = super()._unload_and_optionally_merge(*args, **kwargs)
        self._take_off(self.pelt_attention)
        return base

    @staticmethod
    def _take_off(attachment: Attachment) -> None:
        """The modules read the model's own configurations."""
        attachment.clear()
        attachment.hide_views()


# By which PEFT names the kind of a tuner; a pickle finds the class by its __qualname__.
AcceleratedLoraModel.__name__ = LoraModel.__name__


def replacement(name: str, tuner: Any, backend: str | None) -> Replacement:
    """What a LoraModel becomes."""
    name, reason = name or "LoraModel", _why_left_alone(tuner.model, backend)
    if reason:
        return Replacement(name, tuner, None, reason=reason)
    return Replacement(name, tuner, AcceleratedLoraModel, OPERATOR, EXCEPTION)


def _why_left_alone(base: Any, backend: str | None) -> str:
    """Why a model keeps the attention it has; empty where it is served."""
    reason = why_unknown(base)
    if reason:
        return reason
    names = {config._attn_implementation for config in configs_of(base.base_model)}
    if not names <= {SDPA, PELT_SDPA}:
        return f"its attention is {', '.join(sorted(names))}; {SDPA} is served"
    if base.device.type != "cpu":
        return f"it is on {base.device}; on a CPU its attention is served"
    if not is_for_cpu(backend):
        return f"its attention is served by the backend cpu, and {backend} was asked for"
    return ""
