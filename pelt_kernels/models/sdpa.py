"""transformers' attention function "pelt_sdpa": what "sdpa" computes, on a CPU by
`prefix_attention` without a prefix where that takes less time.

PyTorch's scaled_dot_product_attention makes every score there if it has to drop some, and visits
keys that a mask hides, of a causal batch with padding all that stand behind a query. The masks have
the values of those of "sdpa", so a call of any other kind goes to it as it came.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

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
    if pays(query, key, value, dropout, kwargs):
        is_causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        seen = seen_keys(query, key, attention_mask, is_causal)
        if seen is not None:
            return attend(query, key, value, seen, scaling, dropout), None
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


class SeenKeys(NamedTuple):
    """Which keys the queries of an attention see.

    Attributes:
        key_mask: [B, N] bool, False for those that none sees, or None.
        is_causal: whether row i sees keys j <= i + N - S only.
    """

    key_mask: Tensor | None
    is_causal: bool


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: SeenKeys,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """The attention by the kernels, [B, S, H, E]."""
    out = prefix_attention(
        query,
        key,
        value,
        key_mask=seen.key_mask,
        is_causal=seen.is_causal,
        scale=scaling,
        dropout_p=dropout,
        backend=None if current_request() else "cpu",
    )
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous()


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


def pays(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, options: dict[str, Any]
) -> bool:
    """Whether the kernels compute an attention in less time, of whichever keys the queries see;
    `options` are transformers' further arguments.
    """
    # First, so that no compiled graph depends on the sizes below.
    if query.device.type != "cpu" or not _is_plain_call(query, key, value):
        return False
    scores = query.shape[:3].numel() * key.shape[2]
    if (
        scores < (PAYS_FROM_WITH_DROPOUT if dropout else PAYS_FROM)
        or query.dtype not in DTYPES
        or not query.dtype == key.dtype == value.dtype
        or query.shape[-1] != value.shape[-1]
        or any(options.get(name) is not None for name in ("position_bias", "softcap", "s_aux"))
        or query.shape[2] == 1  # a step of generate(), which nobody has measured
    ):
        return False
    request = current_request()
    if request and backend_of(request) != "cpu":
        return False
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    return not _why_not(request or "cpu", query.shape[-1], query.dtype, needs_grad)


def seen_keys(query: Tensor, key: Tensor, mask: Tensor | None, is_causal: bool) -> SeenKeys | None:
    """What a mask of "sdpa" lets queries see, where the kernels can be told so: all, all but
    padding, or of those the ones up to a query's own.

    It is told by the mask's values, since one who wraps a layer, as checkpointing does, may hand on
    another tensor than the mask function made. That takes about a hundredth of the attention's
    time. `is_causal` counts where there is no mask, from the first key on.
    """
    s, n = query.shape[2], key.shape[2]
    if mask is None:
        # A cache of fixed size has room behind the queries.
        return SeenKeys(None, is_causal) if not is_causal or s == n else None
    if mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[3] != n:
        return None
    rows = mask[:, 0]
    last = rows[:, -1]
    if rows.shape[1] == 1 or rows.stride(1) == 0:
        return SeenKeys(last, False)
    causal = torch.ones(s, n, dtype=torch.bool).tril_(n - s)
    if rows.shape[1] == s and torch.equal(rows, last[:, None] & causal):
        return SeenKeys(None if last.all() else last, True)
    return None


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
