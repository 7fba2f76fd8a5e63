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
from transformers.utils import logging

from .attention_config import PELT

logger = logging.get_logger(__name__)


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


def check_mask(mask: Any) -> None:
    """Raises ValueError unless the mask is None or a padding mask [B, N] bool."""
    if mask is not None and (
        not isinstance(mask, Tensor) or mask.ndim != 2 or mask.dtype != torch.bool
    ):
        got = (
            f"{list(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        )
        raise ValueError(
            "pelt attention: expected attention_mask [B, N] with 1 for tokens and 0 for padding, "
            f"got {got}; masks for "
            "single query-key pairs are not supported by gates and prefixes (generate() makes one "
            "unless cache_implementation is left at its default)"
        )


def is_causal(module: nn.Module) -> bool:
    """Whether an attention module's queries see no later keys. Its keys may come from a cache, in
    which no prefix lies: that is seen at each step anew.
    """
    return bool(getattr(module, "is_causal", False))


def wants_weights(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether this call is asked for attention weights, as transformers decides it; then says once
    what that costs.
    """
    default = getattr(module.config, "output_attentions", False)
    if not kwargs.get("output_attentions", default):
        return False
    if not torch.compiler.is_compiling():
        logger.warning_once(
            "pelt attention: output_attentions=True: the weights [B, H, S, P + N] are computed by "
            "PyTorch beside the kernels, which never make them, prefix columns first; leave it out "
            "where speed and memory matter"
        )
    return True


def base_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
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
    if mask is not None or is_causal(module):
        if mask is not None and name == "eager" and not is_causal(module):
            hidden = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device)
            mask = hidden.masked_fill(~mask, torch.finfo(query.dtype).min)[:, None, None, :]
        elif mask is not None and name == "sdpa" and not is_causal(module):
            mask = mask[:, None, None, :]
        else:
            mask = AttentionMaskInterface()[name](
                batch_size=query.shape[0],
                q_length=query.shape[2],
                kv_length=key.shape[2],
                q_offset=key.shape[2] - query.shape[2],
                kv_offset=0,
                mask_function=causal_mask_function
                if is_causal(module)
                else bidirectional_mask_function,
                attention_mask=mask,
                allow_is_causal_skip=False,
                dtype=query.dtype,
                config=module.config,
                device=query.device,
            )
    return function(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
