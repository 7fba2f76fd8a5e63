"""The real tokens of a padded batch, one sentence behind the other."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """Which rows of a padded batch [B, S, ...] stand in a packed one [1, T, ...], in their order.

    Attributes:
        rows: int64 [T], of the batch's B · S rows.
        sentences: int64 [T], the sentence that each belongs to.
        counts: int64 [B], how many a sentence has; its first is one of them.
        width: S.
    """

    rows: Tensor
    sentences: Tensor
    counts: Tensor
    width: int

    @classmethod
    def of(cls, mask: Tensor) -> Packing | None:
        """By a mask [B, S] bool, True for real tokens; None where the first of a sentence is none,
        which many heads read all the same: its hidden state would be 0 for all sentences.
        """
        if not bool(mask[:, :1].all()):
            return None
        rows = mask.flatten().nonzero()[:, 0]
        return cls(rows, rows // mask.shape[1], mask.sum(1), mask.shape[1])

    @property
    def share(self) -> float:
        """T / (B · S)."""
        return len(self.rows) / max(len(self.counts) * self.width, 1)

    def pack(self, x: Tensor) -> Tensor:
        """[B, S, ...] -> [1, T, ...]."""
        packed: Tensor = _Pack.apply(x, self.rows)
        return packed

    def unpack(self, x: Tensor) -> Tensor:
        """[1, T, ...] -> [B, S, ...], with zeros for padding."""
        padded: Tensor = _Unpack.apply(x, self.rows, (len(self.counts), self.width))
        return padded

    def means(self, values: Tensor) -> Tensor:
        """The means over each sentence's tokens, [B], of values [1, T]."""
        sums = values.new_zeros(len(self.counts)).index_add(0, self.sentences, values[0])
        return sums / self.counts

    def over_tokens(self, values: Tensor) -> Tensor:
        """[1, T] of values [B], each for all tokens of its sentence."""
        return values.index_select(0, self.sentences)[None]


class _Pack(torch.autograd.Function):
    """Rows of x [B, S, ...]. PyTorch's own gradient of that adds them up one by one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.shape = x.shape[:2]
        return x.flatten(0, 1).index_select(0, rows)[None]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        return _Unpack.apply(dy, rows, ctx.shape), None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(rows)
        padded = x.new_zeros((shape[0] * shape[1], *x.shape[2:]))
        return padded.index_copy_(0, rows, x[0]).unflatten(0, tuple(shape))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        (rows,) = ctx.saved_tensors
        return _Pack.apply(dy, rows), None, None
