"""Dropout whose mask is never stored: each element's fate is a function of a seed and its place.

Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011). A tensor is
seen as rows of ``columns`` elements; a row starts at a multiple of 4, so element (row, column) has
the index ``e = row * round_up(columns, 4) + column``. Its 32-bit word is ``philox(counter=(e // 4,
0 ... 64 bits), key=seed)[e % 4]`` and it is kept if ``word >= floor(p * 2**32)``. Every backend
computes exactly these words.

On CPU tensors the compiled module writes them; torch's own integer arithmetic, which takes some 40
times as long, is for other devices and for tracers.
"""

from __future__ import annotations

import math
import sys
from functools import lru_cache

import torch
from torch import Tensor

from . import _native

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


def threshold(p: float) -> int:
    """The smallest word that is kept, for a dropout probability p in [0, 1)."""
    return min(math.floor(p * 2.0**32), _LOW)


def philox4x32(counter_low: Tensor, counter_high: Tensor, seed: int | Tensor) -> list[Tensor]:
    """The four output words of Philox4x32-10 with the counter (low, high, 0, 0), as int64 tensors
    in [0, 2**32).
    """
    if isinstance(seed, Tensor):
        seed = seed.to(counter_low.device)
    else:
        seed &= 0xFFFFFFFFFFFFFFFF
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    c0, c1, c2, c3 = (
        counter_low,
        counter_high,
        torch.zeros_like(counter_low),
        torch.zeros_like(counter_low),
    )
    for _ in range(10):
        high0, low0 = _multiply(c0, _M0)
        high1, low1 = _multiply(c2, _M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return [c0, c1, c2, c3]


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32 bit product. Two 16-bit halves of b keep each product inside
    int64.
    """
    by_low, by_high = a * (b & 0xFFFF), a * (b >> 16)
    middle = (by_low >> 16) + by_high
    return middle >> 16, ((middle & 0xFFFF) << 16) | (by_low & 0xFFFF)


def keep_mask(
    rows: int, columns: int, p: float, seed: int | Tensor, device: torch.device
) -> Tensor:
    """[rows, columns] bool: True where dropout with probability p keeps the element."""
    if _native.can_fill_dropout(device):
        out = torch.empty(rows, columns, dtype=torch.bool, device=device)
        _native.fill_dropout(out, 1, threshold(p), int(seed))
        return out
    groups = (columns + 3) // 4
    counter = torch.arange(rows * groups, dtype=torch.int64, device=device)
    words = torch.stack(philox4x32(counter & _LOW, counter >> 32, seed), dim=-1)
    return words.view(rows, groups * 4)[:, :columns] >= threshold(p)


def dropout_factor(rows: int, columns: int, p: float, seed: int | Tensor, like: Tensor) -> Tensor:
    """[rows, columns]: 0 where an element is dropped, 1 / (1 - p) where it is kept, in the dtype of
    ``like``.
    """
    if _native.can_fill_dropout(like.device):
        out = torch.empty(rows, columns, dtype=like.dtype, device=like.device)
        _native.fill_dropout(out, _kept_bits(p, like.dtype), threshold(p), int(seed))
        return out
    return keep_mask(rows, columns, p, seed, like.device).to(like.dtype) / (1.0 - p)


@lru_cache(maxsize=64)
def _kept_bits(p: float, dtype: torch.dtype) -> int:
    """The bits of 1 / (1 - p), rounded as the division of a tensor rounds it."""
    kept = torch.ones(1, dtype=dtype) / (1.0 - p)
    return int.from_bytes(bytes(kept.view(torch.uint8).tolist()), sys.byteorder)
