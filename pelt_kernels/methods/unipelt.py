"""UniPELT: adapter, prefix tuning and LoRA together, each behind a gate (Mao et al., ACL 2022)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, TypeVar

from ._config import (
    GATE_POOLINGS,
    MethodConfig,
    check,
    check_choice,
    check_number,
    check_parts,
    with_changes,
)
from .adapter import BottleneckAdapterConfig
from .lora import LoraConfig
from .prefix import PrefixTuningConfig

PARTS: dict[str, type[MethodConfig]] = {
    "adapter": BottleneckAdapterConfig,
    "prefix": PrefixTuningConfig,
    "lora": LoraConfig,
}
GATE_PENALTIES = ("entropy", "l1")
Part = TypeVar("Part", BottleneckAdapterConfig, PrefixTuningConfig, LoraConfig)


@dataclass(frozen=True, kw_only=True)
class UniPELTConfig(MethodConfig):
    """Any of adapter, prefix and LoRA (None leaves one out), with gates
    ``g = mean_t sigmoid(w · x_t + b)`` per sentence and layer: one for the adapter (from its input
    z), one for the prefix and one for each LoRA target (from the attention's input h).

    Inside UniPELT a part is gated unless it says ``gated=False``. `gate_pooling` holds for all
    parts: ``masked_mean`` makes a prediction independent of padding; ``mean`` counts padding, as
    the official code does.

    In a decoder, where no word may depend on later ones, each word has gates of its own for adapter
    and LoRA, ``g_t = sigmoid(w · x_t + b)``, whatever the pooling, and a prefix has the gate that
    `PrefixTuningConfig` describes.

    With `gate_penalty` c > 0 a training loss has one more term: c times the mean over all gates, of
    layers, parts and sentences, of

        entropy: H(g) = -g ln g - (1 - g) ln(1 - g), least at 0 and 1, largest (0.69) at 1/2
        l1:      g

    ``entropy`` has each sentence's gates decide, ``l1`` closes what does not pay for itself. Either
    makes gates fall below a threshold, so that `PeltModel.skip_below` has something to skip. In a
    decoder, where each token has gates, the mean is over all rows, padding included. This is of
    this package, not of the paper.

    Presets: `UniPELTConfig.apl()` (adapter, prefix, LoRA: the paper's main model) and
    `UniPELTConfig.ap()`.

    Other than the authors' code: there is no central gate (one decision for all parts of a layer,
    off by default there), and gradient checkpointing keeps the prefixes, which are dropped there.

    Raises:
        ValueError: no part at all, a part of the wrong type, a pooling that a part contradicts, or
            a penalty of gates where no part has one.
    """

    method: ClassVar[str] = "unipelt"

    adapter: BottleneckAdapterConfig | None = field(default_factory=BottleneckAdapterConfig)
    prefix: PrefixTuningConfig | None = field(default_factory=PrefixTuningConfig)
    lora: LoraConfig | None = field(default_factory=LoraConfig)
    gate_pooling: str = "masked_mean"
    gate_penalty: float = 0.0
    gate_penalty_kind: str = "entropy"

    def __post_init__(self) -> None:
        check_choice(self, "gate_pooling", GATE_POOLINGS)
        check_choice(self, "gate_penalty_kind", GATE_PENALTIES)
        check_number(self, "gate_penalty")
        check(self.gate_penalty >= 0, self, "gate_penalty", ">= 0")
        check_parts(self, PARTS)
        for name in PARTS:
            part = getattr(self, name)
            if part is not None:
                object.__setattr__(self, name, self._resolved(name, part))
        if self.adapter is None and self.prefix is None and self.lora is None:
            raise ValueError(
                "UniPELTConfig: expected at least one of adapter, prefix and lora, got none"
            )
        parts = [part for name in PARTS if (part := getattr(self, name)) is not None]
        if self.gate_penalty and not any(part.gated for part in parts):
            raise ValueError(
                "UniPELTConfig: expected a gated part for gate_penalty to act on, got none; set "
                "gate_penalty to 0 or leave gated=False out"
            )

    def _resolved(self, name: str, part: Part) -> Part:
        """The part with its gate decided: gated=None becomes True, the pooling this config's."""
        if part.gate_pooling not in (GATE_POOLINGS[0], self.gate_pooling):
            raise ValueError(
                "UniPELTConfig: expected one gate_pooling for all parts, got "
                f"{self.gate_pooling!r} and {part.gate_pooling!r} ({name}); set it on UniPELTConfig"
            )
        gated = True if part.gated is None else part.gated
        return with_changes(part, gated=gated, gate_pooling=self.gate_pooling)

    @classmethod
    def apl(cls, *, gated: bool = True, gate_pooling: str = "masked_mean") -> UniPELTConfig:
        """Adapter, prefix and LoRA with the paper's sizes; ``gated=False``: its NoGate row."""
        return cls(
            adapter=BottleneckAdapterConfig(gated=gated),
            prefix=PrefixTuningConfig(gated=gated),
            lora=LoraConfig(gated=gated),
            gate_pooling=gate_pooling,
        )

    @classmethod
    def ap(cls, *, gated: bool = True, gate_pooling: str = "masked_mean") -> UniPELTConfig:
        """Adapter and prefix with the paper's sizes."""
        return cls(
            adapter=BottleneckAdapterConfig(gated=gated),
            prefix=PrefixTuningConfig(gated=gated),
            lora=None,
            gate_pooling=gate_pooling,
        )
