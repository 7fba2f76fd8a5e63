"""The two ends that a method is compared with: the head alone, and everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ._config import MethodConfig


@dataclass(frozen=True, kw_only=True)
class HeadConfig(MethodConfig):
    """A linear probe: the classification head, every parameter outside the encoder, alone."""

    method: ClassVar[str] = "head"


@dataclass(frozen=True, kw_only=True)
class FullConfig(MethodConfig):
    """Full fine-tuning: every parameter, in place; no untouched base model is left."""

    method: ClassVar[str] = "full"
