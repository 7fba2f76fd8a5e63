"""What each method asks of a model."""

from __future__ import annotations

from typing import NamedTuple

from ._config import MethodConfig
from .adamix import AdaMixConfig
from .adapter import BottleneckAdapterConfig
from .baselines import FullConfig, HeadConfig
from .bitfit import BitFitConfig
from .composite import CompositeConfig
from .control_prefixes import ControlPrefixesConfig
from .hyperpelt import HyperPELTConfig
from .lora import LoraConfig
from .prefix import PrefixTuningConfig
from .pst import PSTConfig
from .unipelt import UniPELTConfig
from .vlm import VLMConfig


class Parts(NamedTuple):
    """A method as the models read it: what is added, and what is trained beside the head.

    `trainable_tokens` are words by id (negative: from the last) whose embeddings are trained while
    the other rows of the table stay as they are; a head that is tied to the table sees them, too.
    They are one parameter [n, D] of their own, so no optimizer keeps anything for the whole table.
    ``CompositeConfig(trainable_tokens=(50257, 50258))`` asks for them, alone or beside any parts. A
    config with such a field (checked by `set_tokens`) passes it on in `parts_of`, which is all.
    """

    adapter: BottleneckAdapterConfig | None = None
    prefix: PrefixTuningConfig | None = None
    lora: LoraConfig | None = None
    tune: str = "none"  # "none", "bias" or "all"
    mixture: AdaMixConfig | None = None
    pruning: PSTConfig | None = None
    tune_head: bool = True
    trainable_tokens: tuple[int, ...] = ()
    vlm: VLMConfig | None = None
    hyper: HyperPELTConfig | None = None
    tune_norms: bool = False
    gate_penalty: float = 0.0
    gate_penalty_kind: str = "entropy"

    @property
    def attributes(self) -> dict[str, int]:
        """How many labels each attribute has that a call of the model is given labels for."""
        if isinstance(self.prefix, ControlPrefixesConfig):
            return dict(self.prefix.attributes)
        return {}

    @property
    def has_parallel_adapter(self) -> bool:
        """Whether an adapter reads the FFN's input."""
        if self.hyper is not None and self.hyper.bottleneck != 0:
            return True
        return self.adapter is not None and self.adapter.placement == "parallel"

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks of which a call has to say one for each sentence; none: nothing is asked."""
        if self.vlm is not None:
            return self.vlm.tasks
        return () if self.hyper is None or self.hyper.materialized else self.hyper.tasks

    @property
    def gated(self) -> list[BottleneckAdapterConfig | PrefixTuningConfig | LoraConfig]:
        """The parts that a learned gate scales."""
        return [part for part in (self.adapter, self.prefix, self.lora) if part and part.gated]


def parts_of(config: MethodConfig) -> Parts:
    """The parts that a method puts into a model. A part's own config is that part alone."""
    match config:
        case BottleneckAdapterConfig():
            return Parts(adapter=config)
        case ControlPrefixesConfig():
            return Parts(prefix=config, trainable_tokens=config.trainable_tokens)
        case PrefixTuningConfig():
            return Parts(prefix=config)
        case LoraConfig():
            return Parts(lora=config)
        case AdaMixConfig():
            return Parts(mixture=config)
        case PSTConfig():
            return Parts(pruning=config, tune_head=config.train_head)
        case BitFitConfig():
            return Parts(tune="bias")
        case HeadConfig():
            return Parts()
        case FullConfig():
            return Parts(tune="all")
        case VLMConfig():
            return Parts(vlm=config, trainable_tokens=config.trainable_tokens)
        case HyperPELTConfig():
            return Parts(hyper=config, tune_norms=config.train_norms)
        case UniPELTConfig():
            return Parts(
                adapter=config.adapter,
                prefix=config.prefix,
                lora=config.lora,
                trainable_tokens=_tokens(config.prefix),
                gate_penalty=config.gate_penalty,
                gate_penalty_kind=config.gate_penalty_kind,
            )
        case CompositeConfig():
            return Parts(
                adapter=config.adapter,
                prefix=config.prefix,
                lora=config.lora,
                tune="bias" if config.bitfit else "none",
                mixture=config.adamix,
                pruning=config.pst,
                tune_head=config.pst is None or config.pst.train_head,
                trainable_tokens=(*config.trainable_tokens, *_tokens(config.prefix)),
            )
    raise NotImplementedError(f"parts_of does not say what {type(config).__name__} is made of")


def _tokens(prefix: PrefixTuningConfig | None) -> tuple[int, ...]:
    """The words that control prefixes train as a part."""
    return prefix.trainable_tokens if isinstance(prefix, ControlPrefixesConfig) else ()
