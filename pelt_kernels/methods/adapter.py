"""The bottleneck adapter after the FFN (Houlsby et al. 2019, where Pfeiffer et al. 2021 put it) or
beside it (He et al. 2022).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ops.gated_adapter.contract import ACTIVATIONS
from ._config import (
    MethodConfig,
    check_choice,
    check_dropout,
    check_gate,
    check_int,
    check_number,
)

PLACEMENTS = ("sequential", "parallel")
STARTS = ("normal", "lora")


@dataclass(frozen=True, kw_only=True)
class BottleneckAdapterConfig(MethodConfig):
    """One adapter ``u(x) = W_up φ(W_down x + b_d) + b_u`` per layer. ``sequential``: between the
    FFN and its residual, passing twice through the layer's frozen LayerNorm; ``parallel``: beside
    the FFN, reading what it reads:

        z = LN(f + a),    out = LN( s · g · u(z) + f + a )        sequential
                          out = LN( s · g · u(a) + f + a )        parallel

    with f the FFN's output and a the attention block's, which is the FFN's input. A layer that
    normalises before its sub-layers (GPT-2, T5, Llama) has the adapter on the FFN's output before
    its residual, with no LayerNorm around it: ``f + s · g · u(f)``, parallel ``f + s · g · u(n)``
    with n what the FFN reads. The bottleneck is R = D // reduction_factor.

    Attributes:
        reduction_factor: D / R, rounded down.
        bottleneck: R itself; wins over reduction_factor.
        activation: φ: relu, gelu (erf), gelu_tanh (what UniPELT's fork calls gelu), silu, tanh,
            identity.
        dropout: on the adapter's output.
        placement: sequential or parallel.
        scale: s; the paper of the parallel adapter uses 4.
        start: ``normal``, both projections N(0, 0.02); ``lora``, W_down as U(±1 / sqrt(D)) and W_up
            as 0, so that the model starts as the base model.
        gated: whether g is learned; None: as the method says (alone: no gate, inside UniPELT: a
            gate).
        gate_pooling: ``masked_mean`` (a prediction does not depend on padding) or ``mean`` (the
            official code).

    Raises:
        ValueError: a field outside its range.
    """

    method: ClassVar[str] = "adapter"

    reduction_factor: int = 16
    bottleneck: int | None = None
    activation: str = "relu"
    dropout: float = 0.0
    placement: str = "sequential"
    scale: float = 1.0
    start: str = "normal"
    gated: bool | None = None
    gate_pooling: str = "masked_mean"

    def __post_init__(self) -> None:
        check_int(self, "reduction_factor", 1)
        check_int(self, "bottleneck", 1, optional=True)
        check_choice(self, "activation", tuple(ACTIVATIONS))
        check_dropout(self, "dropout")
        check_choice(self, "placement", PLACEMENTS)
        check_number(self, "scale")
        check_choice(self, "start", STARTS)
        check_gate(self)

    def bottleneck_of(self, hidden_size: int) -> int:
        """R for a model of size D.

        Raises:
            ValueError: the reduction factor leaves nothing of D.
        """
        bottleneck = self.bottleneck or hidden_size // self.reduction_factor
        if bottleneck < 1:
            raise ValueError(
                "BottleneckAdapterConfig: expected reduction_factor <= the model's hidden size "
                f"{hidden_size}, got {self.reduction_factor}; lower it or set bottleneck"
            )
        return bottleneck
