"""The inputs of a call by name, for what is composed of PyTorch's operations."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .contract import without_hidden


class Inputs(NamedTuple):
    """The contract's inputs."""

    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: list[Tensor]
    prefix_v: list[Tensor]
    prefix_index: list[Tensor | None]
    gate: Tensor | None
    key_mask: Tensor | None
    lengths: Tensor | None
    bias: Tensor | None

    def without_hidden(self) -> Inputs:
        """The same with zeros in the keys and values that the mask or the length hides."""
        k, v = (without_hidden(rows, self.key_mask, self.lengths) for rows in (self.k, self.v))
        return self._replace(k=k, v=v)
