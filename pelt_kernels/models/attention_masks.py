"""The mask function of "pelt" attention, and the masks that other attentions want."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionMaskInterface
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    sliding_window_bidirectional_overlay,
    sliding_window_overlay,
)


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
            "single query-key pairs are not supported by gates and prefixes"
        )


def padding_mask(
    batch_size: int = 0,
    q_length: int = 0,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = bidirectional_mask_function,
    attention_mask: Tensor | None = None,
    device: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask function for "pelt": the padding mask [B, N] bool of the keys that are
    there, or None.

    Whether queries see later keys is not in it: the attention module says that of itself, as it
    says how wide its window is. Of a cache with more room than text (a static one) N is what is
    filled after these queries; `attention_forward` reads as many of its keys.
    """
    if _base_of(mask_function) is bidirectional_mask_function:
        return attention_mask
    filled = int(q_offset) + q_length - kv_offset
    if attention_mask is not None:
        return attention_mask[:, kv_offset : kv_offset + filled]
    if filled == kv_length:
        return None
    return torch.ones(batch_size, filled, dtype=torch.bool, device=device)


def _base_of(mask_function: Any) -> Any:
    """The bidirectional or causal mask function under a window, or the function itself.

    Raises:
        ValueError: anything else is laid over it.
    """
    if mask_function in (bidirectional_mask_function, causal_mask_function):
        return mask_function
    for cell in getattr(mask_function, "__closure__", None) or ():
        members = cell.cell_contents
        if isinstance(members, tuple) and len(members) == 2:
            window, base = members
            is_window = getattr(window, "__qualname__", "").startswith("sliding_window_")
            if is_window and base in (bidirectional_mask_function, causal_mask_function):
                return base
    raise ValueError(
        "pelt attention: expected a bidirectional or a causal mask, or one of them with a window, "
        "got another one (packed sentences, blocks), which gates and prefixes do not support"
    )


def window_bias(query: Tensor, n: int, window: int | None, causal: bool) -> Tensor | None:
    """0 where a query sees a key of n in its window, else the lowest number, [1, 1, S, N]; None
    where every key is in every query's window. The last query stands at the last key.
    """
    if window is None or n <= window:
        return None
    s = query.shape[2]
    distance = torch.arange(n - s, n, device=query.device)[:, None]
    distance = distance - torch.arange(n, device=query.device)
    is_out = distance >= window if causal else distance.abs() >= window
    bias = torch.zeros(s, n, dtype=query.dtype, device=query.device)
    return bias.masked_fill(is_out, torch.finfo(query.dtype).min)[None, None]


def mask_for(
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    causal: bool,
    window: int | None,
) -> Tensor | None:
    """A padding mask in the form that an attention of transformers wants.

    eager adds its mask and sdpa reads a boolean one; both broadcast over queries, so [B, 1, 1, N]
    is enough where every query sees the same keys.
    """
    if window is not None and key.shape[2] <= window:
        window = None
    if mask is None and not causal and window is None:
        return None
    if mask is not None and not causal and window is None and name in ("eager", "sdpa"):
        if name == "sdpa":
            return mask[:, None, None, :]
        hidden = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device)
        return hidden.masked_fill(~mask, torch.finfo(query.dtype).min)[:, None, None, :]
    function = causal_mask_function if causal else bidirectional_mask_function
    if window is not None:
        overlay = (
            sliding_window_overlay(window)
            if causal
            else sliding_window_bidirectional_overlay(window - 1)
        )
        function = and_masks(overlay, function)
    made: Tensor | None = AttentionMaskInterface()[name](
        batch_size=query.shape[0],
        q_length=query.shape[2],
        kv_length=key.shape[2],
        q_offset=key.shape[2] - query.shape[2],
        kv_offset=0,
        mask_function=function,
        attention_mask=mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        dtype=query.dtype,
        config=module.config,
        device=query.device,
    )
    return made
