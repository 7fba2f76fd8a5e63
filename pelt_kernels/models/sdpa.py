"""transformers' attention function "pelt_sdpa": what "sdpa" computes, on a CPU by
`prefix_attention` without a prefix where that takes less time.

PyTorch's scaled_dot_product_attention makes every score there if it has to drop some, and visits
keys that a mask hides, of a causal batch with padding all that stand behind a query. The masks have
the values of those of "sdpa", so a call of any other kind goes to it as it came.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, sdpa_mask

from ..ops.prefix_attention.without_prefix import SeenKeys, attend, is_plain_call, pays
from .attention_config import PELT_SDPA

SDPA = "sdpa"


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
    find = partial(seen_keys, query, key, attention_mask, causal)
    out = by_kernels(query, key, value, find, scaling, dropout, kwargs)
    if out is not None:
        return out, None
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


def by_kernels(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    find_seen: Callable[[], SeenKeys | None],
    scaling: float | None,
    dropout: float,
    options: dict[str, Any],
) -> Tensor | None:
    """The attention by the kernels, [B, S, H, E]; None where they do not compute the same in less
    time. `find_seen` is asked last; `options` are transformers' further arguments.
    """
    bias = options.get("position_bias")
    if options.get("softcap") is not None or options.get("s_aux") is not None:
        return None
    if not pays(query, key, value, dropout, bias):
        return None
    seen = find_seen()
    if seen is None or (bias is not None and not _every_query_sees(seen, query, key)):
        return None
    return attend(query, key, value, seen, scaling, dropout, bias)


def _every_query_sees(seen: SeenKeys, query: Tensor, key: Tensor) -> bool:
    """Whether every query sees a key. Beside a bias "sdpa" hides keys by adding the lowest number,
    so one that sees none sees all there.
    """
    of_first = key.shape[2] - query.shape[2] + 1 if seen.is_causal else key.shape[2]
    if seen.key_mask is None:
        return of_first > 0
    return bool(seen.key_mask[:, : max(of_first, 0)].any(-1).all())


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
        and is_plain_call(attention_mask)
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


AttentionInterface.register(PELT_SDPA, sdpa_forward)
AttentionMaskInterface.register(PELT_SDPA, padding_or_sdpa_mask)
