"""The bottleneck adapter after the FFN (Houlsby et al. 2019, where Pfeiffer et al. 2021 put it)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..ops.gated_adapter.contract import ACTIVATIONS
from ._config import MethodConfig, Parts, check_choice, check_dropout, check_gate, check_int

if TYPE_CHECKING:
    from .adamix import AdaMixConfig


@dataclass(frozen=True, kw_only=True)
class BottleneckAdapterConfig(MethodConfig):
    """One adapter per layer, between the FFN and its residual, passing twice through the layer's
    frozen LayerNorm:

        z = LN(f + a),    out = LN( g · (W_up φ(W_down z + b_d) + b_u) + f + a )

    with f the FFN's output and a the attention block's. The bottleneck is R = D //
    reduction_factor.

    Attributes:
        reduction_factor: D / R, rounded down.
        bottleneck: R itself; wins over reduction_factor.
        activation: φ: relu, gelu (erf), gelu_tanh (what UniPELT's fork calls gelu), silu, tanh,
            identity.
        dropout: on the adapter's output.
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
    gated: bool | None = None
    gate_pooling: str = "masked_mean"

    def __post_init__(self) -> None:
        check_int(self, "reduction_factor", 1)
        check_int(self, "bottleneck", 1, optional=True)
        check_choice(self, "activation", tuple(ACTIVATIONS))
        check_dropout(self, "dropout")
        check_gate(self)

    @property
    def parts(self) -> Parts:
        return Parts(adapter=self)

    def bottleneck_of(self, hidden_size: int) -> int:
        """R for a model of size D.

        Raises:
            ValueError: the reduction factor leaves nothing of D.
        """
        return bottleneck_of(self, hidden_size)


def bottleneck_of(config: BottleneckAdapterConfig | AdaMixConfig, hidden_size: int) -> int:
    """R of an adapter for a model of size D. Raises ValueError where nothing of D is left."""
    bottleneck = config.bottleneck or hidden_size // config.reduction_factor
    if bottleneck < 1:
        raise ValueError(
            f"{type(config).__name__}: expected reduction_factor <= the model's hidden size "
            f"{hidden_size}, got {config.reduction_factor}; lower it or set bottleneck"
        )
    return bottleneck
