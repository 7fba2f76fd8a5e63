"""The hook into transformers' attention: a function and a mask function, both registered as "pelt",
and what any layer without a prefix is given: the attention the base model was loaded with.

The mask function returns the padding mask [B, N] as it came, so it never becomes dense.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from .attention_config import PELT


def register_attention(attention_forward: Callable[..., Any]) -> None:
    """Makes "pelt" known; without a mask function transformers would drop the mask in silence."""
    AttentionInterface.register(PELT, attention_forward)
    AttentionMaskInterface.register(PELT, padding_mask)


def padding_mask(
    *args: Any,
    q_length: int = 0,
    kv_length: int = 0,
    q_offset: int = 0,
    attention_mask: Tensor | None = None,
    mask_function: Any = bidirectional_mask_function,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask function for "pelt": the padding mask [B, N] bool itself, or None.

    Whether queries see later keys is not in it: the attention module says that of itself.
    """
    if mask_function is bidirectional_mask_function:
        return attention_mask
    if mask_function is not causal_mask_function:
        raise ValueError(
            "pelt attention: expected a bidirectional or a causal mask, got an overlaid one "
            "(packed sentences, windows), which gates and prefixes do not support"
        )
    if kv_length != q_offset + q_length:
        raise ValueError(
            f"pelt attention: expected a cache that grows with the text, got {kv_length} keys for "
            f"{q_offset + q_length} tokens; leave cache_implementation at its default"
        )
    return attention_mask


def base_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The attention the base model was loaded with, and the mask in the form that one wants.

    eager adds its mask and sdpa reads a boolean one; both broadcast over queries, so [B, 1, 1, N]
    is enough where every query sees the same keys.
    """
    config: Any = module.config
    name = config.base_attention
    if name == "eager":
        function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if function is None:
            raise ValueError(
                f"pelt attention: expected {type(module).__module__} to define "
                "eager_attention_forward, got none"
            )
    else:
        function = AttentionInterface()[name]
    if mask is not None or causal:
        if mask is not None and name == "eager" and not causal:
            hidden = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device)
            mask = hidden.masked_fill(~mask, torch.finfo(query.dtype).min)[:, None, None, :]
        elif mask is not None and name == "sdpa" and not causal:
            mask = mask[:, None, None, :]
        else:
            mask = AttentionMaskInterface()[name](
                batch_size=query.shape[0],
                q_length=query.shape[2],
                kv_length=key.shape[2],
                q_offset=key.shape[2] - query.shape[2],
                kv_offset=0,
                mask_function=causal_mask_function if causal else bidirectional_mask_function,
                attention_mask=mask,
                allow_is_causal_skip=False,
                dtype=query.dtype,
                config=module.config,
                device=query.device,
            )
    return function(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
