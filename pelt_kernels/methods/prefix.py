"""Prefix tuning in every self-attention layer (Li and Liang 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ._config import MethodConfig, check_flag, check_gate, check_int, set_layers


@dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig(MethodConfig):
    """P learned keys and values in front of each layer's own: ``K' = [g·Pk ; K]`` and
    ``V' = [g·Pv ; V]``.

    They come from one reparametrisation for all layers, ``W2 tanh(W1 E + b1) + b2``
    (`pelt_kernels.nn.PrefixAttention`). A gate near 0 does not remove a prefix: its keys become 0
    and keep their share of the softmax, as in the paper.

    An encoder's attention, a decoder's and the decoder's over the encoder have prefixes and a
    reparametrisation each. A prefix has no position, relative positions do not count it, and a
    window does not hide it. In a decoder there is nothing that all queries of a sentence may see
    and a gate could be computed from: g is ``sigmoid(b)`` there, one number for each layer and kind
    of attention.

    Attributes:
        prefix_length: P; 0 is allowed and changes nothing.
        mid: the width of the reparametrisation; None: the prefixes themselves are the parameters.
        skip_layers: layers without a prefix; a decoder's are counted on from its encoder's.
        gated: whether g (per sentence, from the attention's input) is learned; None: as the method
            says.
        gate_pooling: ``masked_mean`` or ``mean``.
        shift_positions: whether the tokens' positions begin behind the prefix, at P, as in PEFT,
            which keeps prefixes in a decoder's cache; in decoders only.

    Raises:
        ValueError: a field outside its range.
    """

    method: ClassVar[str] = "prefix"

    prefix_length: int = 10
    mid: int | None = 512
    skip_layers: tuple[int, ...] = ()
    gated: bool | None = None
    gate_pooling: str = "masked_mean"
    shift_positions: bool = False

    def skips(self, site: str, number: int, in_stack: int) -> bool:
        """Whether an attention has no prefix: of a kind (encoder, decoder, cross), in a layer by
        its number in the model and in its stack.
        """
        return number in self.skip_layers

    def __post_init__(self) -> None:
        check_int(self, "prefix_length", 0)
        check_int(self, "mid", 1, optional=True)
        set_layers(self, "skip_layers")
        check_gate(self)
        check_flag(self, "shift_positions")
