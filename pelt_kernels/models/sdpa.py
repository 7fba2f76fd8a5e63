"""transformers' attention function "pelt_sdpa": what "sdpa" computes, on a CPU by
`prefix_attention` without a prefix where that takes less time.

PyTorch's scaled_dot_product_attention makes every score there if it has to drop some, and visits
keys that a mask hides. The masks have the values of those of "sdpa", so a call of any other kind
goes to it as it came.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from ..ops import prefix_attention
from ..ops._arguments import is_recorded
from ..ops._dispatch import backend_of, current_request, why_not
from ..ops.prefix_attention.contract import CONTRACT
from .attention_config import PELT_SDPA

SDPA = "sdpa"
DTYPES = (torch.float32, torch.bfloat16)
# Scores, B·H·S·N, from which the kernels take less time than PyTorch's attention: without dropout
# 1.0 of it at 2^17 and 0.7 to 0.97 above, with dropout 0.8 to 1.0 at 2^15 and 0.5 to 0.9 above
# (float32, one and two threads, forward alone and with backward; EPYC Zen 1, torch 2.13).
PAYS_FROM, PAYS_FROM_WITH_DROPOUT = 1 << 17, 1 << 15


def sdpa_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention of a layer: query [B, H, S, E], key and value [B, G, N, E] -> out [B, S, H, E].

    As transformers' ``sdpa_attention_forward``, whose arguments these are. A query that sees no key
    gets 0 from the kernels.
    """
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    causal = causal and attention_mask is None and query.shape[2] > 1
    if _is_for_kernels(query, key, value, attention_mask, dropout, causal, kwargs):
        out = prefix_attention(
            query,
            key,
            value,
            key_mask=None if attention_mask is None else attention_mask[:, 0, 0],
            is_causal=causal,
            scale=scaling,
            dropout_p=dropout,
            backend=None if current_request() else "cpu",
        )
        assert isinstance(out, Tensor)
        return out.transpose(1, 2).contiguous(), None
    found: tuple[Tensor, None] = sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **kwargs,
    )
    return found


def padding_or_sdpa_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function of "pelt_sdpa": `sdpa_mask`'s values [B, 1, S, N], or None.

    A mask of padding alone is a view of the tokens' [B, N], which says so: every query reads the
    same memory.
    """
    if (
        mask_function is bidirectional_mask_function
        and isinstance(attention_mask, Tensor)
        and attention_mask.device.type == "cpu"
        and attention_mask.dtype == torch.bool
        and attention_mask.shape == (batch_size, kv_length)
        and kv_offset == 0
        and _is_plain_call(attention_mask)
    ):
        if allow_is_bidirectional_skip and attention_mask.all():
            return None
        return attention_mask[:, None, None].expand(batch_size, 1, q_length, kv_length)
    made: Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        **kwargs,
    )
    return made


def _is_for_kernels(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    options: dict[str, Any],
) -> bool:
    """Whether the kernels compute the same in less time."""
    # First, so that no compiled graph depends on the sizes below.
    if query.device.type != "cpu" or not _is_plain_call(query, key, value):
        return False
    scores = query.shape[:3].numel() * key.shape[2]
    if (
        scores < (PAYS_FROM_WITH_DROPOUT if dropout else PAYS_FROM)
        or query.dtype not in DTYPES
        or not query.dtype == key.dtype == value.dtype
        # A cache of fixed size has room behind the queries, which torch counts from the first key.
        or (causal and query.shape[2] != key.shape[2])
        or query.shape[-1] != value.shape[-1]
        or any(options.get(name) is not None for name in ("position_bias", "softcap", "s_aux"))
        or not (mask is None or _hides_keys(mask))
        or query.shape[2] == 1  # a step of generate(), which nobody has measured
    ):
        return False
    request = current_request()
    if request and backend_of(request) != "cpu":
        return False
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    return not _why_not(request or "cpu", query.shape[-1], query.dtype, needs_grad)


def _hides_keys(mask: Tensor) -> bool:
    """Whether a mask is that of padding, [B, 1, 1, N], repeated for every query or not."""
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1:
        return False
    return mask.shape[2] == 1 or mask.stride(2) == 0


def _is_plain_call(*tensors: Tensor) -> bool:
    """Whether tensors are torch's own, and no compiler, tracer, transform or mode is at work, which
    know PyTorch's attention better.
    """
    return not is_recorded() and all(type(t) is Tensor for t in tensors)


@cache
def _why_not(request: str, size: int, dtype: torch.dtype, needs_grad: bool) -> str:
    """Why the kernels do not serve heads of a size; empty if they do."""
    blank = torch.empty(1, 1, 2, size, dtype=dtype)
    values: list[Any] = [blank, blank, blank, [], [], [], None, None, None, None]
    return why_not(request, CONTRACT.bind(values, (False, 1.0, 0.0)), needs_grad)


AttentionInterface.register(PELT_SDPA, sdpa_forward)
AttentionMaskInterface.register(PELT_SDPA, padding_or_sdpa_mask)
