"""One module of the base model and the one that stands for it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass
class Replacement:
    """One module of the base model and the one that stands for it, which holds its weight and bias
    under the same names.
    """

    parent: nn.Module
    name: str
    original: nn.Module
    adapted: nn.Module
