"""PEFT's prefix tuning on `prefix_attention`: which models are served."""

from __future__ import annotations

from typing import Any

import peft
import torch
from peft import PeftModel, PeftType
from torch import nn

from ..models.attention_config import configs_of
from ..ops import Prefix, prefix_attention
from .peft_families import why_unknown
from .peft_prefix_attention import SERVED, base_name
from .peft_prefix_model import (
    CLASSES,
    attentions_of,
    has_own_forward,
    why_not,
    window_of,
)
from .replacement import Replacement, library_class
from .versions import check_version

OPERATOR = "prefix_attention"


def replacements(model: nn.Module, backend: str | None) -> list[Replacement]:
    """What each PeftModel of a method that learns prompts becomes.

    Raises:
        ValueError: a version of PEFT that this was not compared with; the backend cannot serve the
            model.
    """
    models = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, PeftModel) and module.active_peft_config.is_prompt_learning
    ]
    if models:
        check_version("peft", peft.__version__)
    return [_replacement(name, module, backend) for name, module in models]


def _replacement(name: str, model: Any, backend: str | None) -> Replacement:
    kind = library_class(model)
    name = name or kind.__name__
    reason = _why_left_alone(model)
    if reason:
        return Replacement(name, model, None, reason=reason)
    attentions = attentions_of(model.base_model)
    if backend is not None:
        _check_backend(model, backend)
    reasons = ["with use_cache=True it goes PEFT's own way"]
    window = window_of(attentions)
    if window:
        reasons.append(f"as it does with more than {window} keys, which not every query sees")
    others = [
        adapter
        for adapter, config in model.peft_config.items()
        if why_not(config, model, len(attentions))
    ]
    if others:
        reasons.append(f"as it does with {', '.join(others)}")
    return Replacement(name, model, CLASSES[kind], OPERATOR, ", ".join(reasons))


def _why_left_alone(model: Any) -> str:
    """Why a model stays as PEFT made it; empty for one that is served."""
    kind, base = library_class(model), model.base_model
    methods = {config.peft_type for config in model.peft_config.values()}
    if methods != {PeftType.PREFIX_TUNING}:
        return f"{', '.join(sorted(methods))} is not prefix tuning"
    if kind not in CLASSES:
        return f"{kind.__name__} hands no prefix to its model; give the config a task_type"
    if "forward" in model.__dict__ and not has_own_forward(model):
        return "its forward was replaced, as by disable_adapter()"
    if unknown := why_unknown(base):
        return unknown
    if base.config.is_encoder_decoder != (kind is peft.PeftModelForSeq2SeqLM):
        return f"{kind.__name__} does not fit {type(base).__name__}"
    names = {base_name(config._attn_implementation_internal) for config in configs_of(base)}
    if not names <= set(SERVED):
        return f"its attention is {', '.join(sorted(names))}, not one of {', '.join(SERVED)}"
    if getattr(base.config, "add_cross_attention", False):
        return "it has cross-attention"
    if getattr(base.config, "reorder_and_upcast_attn", False):
        return "its attention is computed in float32 by reorder_and_upcast_attn"
    layers = len(attentions_of(base))
    reasons = [why_not(config, model, layers) for config in model.peft_config.values()]
    return reasons[0] if all(reasons) else ""


def _check_backend(model: Any, backend: str) -> None:
    """Raises BackendError where the backend cannot serve a layer, by one call."""
    config, base = model.active_peft_config, model.base_model
    groups = config.num_attention_heads
    like = model.prompt_encoder[model.active_adapter].embedding.weight
    size, dtype = config.token_dim // groups, base.dtype
    heads = base.config.num_attention_heads
    q = like.new_zeros(1, heads, 1, size, dtype=dtype).requires_grad_()
    k = like.new_zeros(1, groups, 1, size, dtype=dtype)
    prefix = like.new_zeros(1, groups, size, dtype=dtype)
    with torch.enable_grad():
        prefix_attention(q, k, k, [Prefix(prefix, prefix)], backend=backend)
