"""Low-rank adaptation of frozen projections (Hu et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ._config import (
    MethodConfig,
    check,
    check_dropout,
    check_gate,
    check_int,
    check_number,
    set_names,
)

TARGETS = ("query", "key", "value", "attention_output", "ffn_in", "ffn_out")
MAX_RANK = 256


@dataclass(frozen=True, kw_only=True)
class LoraConfig(MethodConfig):
    """``y = x Wᵀ + b + s · (dropout(x) Aᵀ) Bᵀ`` with s = alpha / r, or s = g(x) where the branch is
    gated.

    A gate replaces alpha / r, as in UniPELT's code; alpha then has no effect. Each target has its
    own gate.

    Attributes:
        r: rank, 1 to 256.
        alpha: numerator of the scale.
        targets: which projections of a layer: query, key, value, attention_output, ffn_in, ffn_out.
        dropout: on the branch's input.
        gated: whether g (per sentence) is learned; None: as the method says.
        gate_pooling: ``masked_mean`` or ``mean``.

    Raises:
        ValueError: a field outside its range.
    """

    method: ClassVar[str] = "lora"

    r: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("query", "value")
    dropout: float = 0.0
    gated: bool | None = None
    gate_pooling: str = "masked_mean"

    def __post_init__(self) -> None:
        check_int(self, "r", 1)
        check(self.r <= MAX_RANK, self, "r", f"<= {MAX_RANK}")
        check_number(self, "alpha")
        set_names(self, "targets", TARGETS)
        check_dropout(self, "dropout")
        check_gate(self)
