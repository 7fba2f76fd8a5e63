"""Attention without a prefix on a CPU: where the kernels take less time than PyTorch's
scaled_dot_product_attention, which makes every score if it has to drop some, and visits keys that a
mask hides.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._arguments import is_recorded
from .._dispatch import backend_of, current_request, why_not
from . import prefix_attention
from .contract import CONTRACT

DTYPES = (torch.float32, torch.bfloat16)
# Scores, B·H·S·N, from which the kernels take no longer than PyTorch's attention, forward alone and
# with backward, on one thread and on two: what benchmarks/plain_attention.py measures.
PAYS_FROM, PAYS_FROM_WITH_DROPOUT = 1 << 17, 1 << 15


class SeenKeys(NamedTuple):
    """Which keys the queries of an attention see.

    Attributes:
        key_mask: [B, N] bool, False for those that none sees, or None.
        is_causal: whether row i sees keys j <= i + N - S only.
    """

    key_mask: Tensor | None
    is_causal: bool


def is_for_cpu(request: str | None) -> bool:
    """Whether what was asked for, if anything, is the backend that has these kernels."""
    return not request or backend_of(request) == "cpu"


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: SeenKeys,
    scaling: float | None,
    dropout: float,
    bias: Tensor | None = None,
) -> Tensor:
    """The attention by the kernels, [B, S, H, E]; bias [1 | B, 1 | H, S, N] is added to scores."""
    out = prefix_attention(
        query,
        key,
        value,
        key_mask=seen.key_mask,
        is_causal=seen.is_causal,
        bias=bias,
        scale=scaling,
        dropout_p=dropout,
        backend=None if current_request() else "cpu",
    )
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous()


def pays(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, bias: Tensor | None = None
) -> bool:
    """Whether the kernels compute an attention in less time, whichever keys the queries see: query
    [B, H, S, E], key and value [B, G, N, E], bias [1 | B, 1 | H, S, N].
    """
    given = [query, key, value, *([] if bias is None else [bias])]
    # First, so that no compiled graph depends on the sizes below.
    if query.device.type != "cpu" or not is_plain_call(*given):
        return False
    scores = query.shape[:3].numel() * key.shape[2]
    if (
        scores < (PAYS_FROM_WITH_DROPOUT if dropout else PAYS_FROM)
        or query.dtype not in DTYPES
        or any(each.dtype != query.dtype for each in given)
        or (bias is not None and bias.shape[2:] != (query.shape[2], key.shape[2]))
        or query.shape[-1] != value.shape[-1]
        or query.shape[2] == 1  # a step of generate(), which nobody has measured
    ):
        return False
    request = current_request()
    if not is_for_cpu(request):
        return False
    needs_grad = torch.is_grad_enabled() and any(each.requires_grad for each in given)
    size, dtype = query.shape[-1], query.dtype
    return not _why_not(request or "cpu", size, dtype, bias is not None, needs_grad)


def is_plain_call(*tensors: Tensor) -> bool:
    """Whether tensors are torch's own, and no compiler, tracer, transform or mode is at work, which
    know PyTorch's attention better.
    """
    return not is_recorded() and all(type(t) is Tensor for t in tensors)


@cache
def _why_not(request: str, size: int, dtype: torch.dtype, has_bias: bool, needs_grad: bool) -> str:
    """Why the kernels do not serve heads of a size; empty if they do."""
    blank = torch.empty(1, 1, 2, size, dtype=dtype)
    bias = torch.empty(1, 1, 2, 2, dtype=dtype) if has_bias else None
    values: list[Any] = [blank, blank, blank, [], [], [], None, None, None, bias]
    return why_not(request, CONTRACT.bind(values, (False, 1.0, 0.0)), needs_grad)
