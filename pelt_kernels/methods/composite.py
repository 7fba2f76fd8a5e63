"""Any methods' parts in one config, such as He et al.'s mix-and-match adapter (ICLR 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ._config import MethodConfig, check_flag, check_parts, set_tokens
from .adamix import AdaMixConfig
from .adapter import BottleneckAdapterConfig
from .lora import LoraConfig
from .prefix import PrefixTuningConfig
from .pst import PSTConfig
from .unipelt import PARTS


@dataclass(frozen=True, kw_only=True)
class CompositeConfig(MethodConfig):
    """The parts that are given, side by side in one model. None leaves one out.

    A part does what it does alone: it is gated only where it says ``gated=True`` (UniPELTConfig
    gates all of them). Every place of a layer takes one part: LoRA, PST and AdaMix each replace the
    Linears they work on, AdaMix's adapters the FFN's second one, and a gated prefix computes its
    gate in the query's.

    Preset: `CompositeConfig.mam()`.

    Attributes:
        adapter, prefix, lora: as in UniPELTConfig.
        bitfit: the biases are trained too.
        pst: the targets are pruned; its ``train_head`` holds for the whole model.
        adamix: experts with their consistency loss.
        trainable_tokens: words whose embeddings are trained, too, by id, see `Parts`.

    Raises:
        ValueError: no part at all, a part of the wrong type, or two parts in one place.
    """

    method: ClassVar[str] = "composite"

    adapter: BottleneckAdapterConfig | None = None
    prefix: PrefixTuningConfig | None = None
    lora: LoraConfig | None = None
    bitfit: bool = False
    pst: PSTConfig | None = None
    adamix: AdaMixConfig | None = None
    trainable_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        wanted = {**PARTS, "pst": PSTConfig, "adamix": AdaMixConfig}
        check_parts(self, wanted)
        check_flag(self, "bitfit")
        set_tokens(self, "trainable_tokens")
        is_empty = not (self.bitfit or self.trainable_tokens)
        if is_empty and all(getattr(self, name) is None for name in wanted):
            raise ValueError(
                f"CompositeConfig: expected at least one of {', '.join(wanted)}, bitfit and "
                "trainable_tokens, got none"
            )
        taken: dict[str, str] = {}
        for name, places in self._places().items():
            for place in places:
                if place in taken:
                    raise ValueError(
                        "CompositeConfig: expected one part for each place of a layer, got "
                        f"{taken[place]} and {name} for {place!r}; leave it out of one part's "
                        "targets, or leave one part out"
                    )
                taken[place] = name

    def _places(self) -> dict[str, tuple[str, ...]]:
        """The places of a layer that each part takes. Which of them modules that LoRA has by other
        names are in, only a model can tell.
        """
        places: dict[str, tuple[str, ...]] = {}
        # A gated prefix shares the query's Linear with LoRA, which is made for that.
        has_gate_in_query = self.prefix is not None and bool(self.prefix.gated)
        lora = () if self.lora is None else self.lora.places
        if has_gate_in_query and "query" not in lora:
            places["the prefix's gate"] = ("query",)
        places["lora"] = lora
        if self.pst is not None:
            places["pst"] = self.pst.targets
        if self.adamix is not None:
            is_adapter = self.adamix.kind == "adapter"
            places["adamix"] = ("ffn_out",) if is_adapter else self.adamix.targets
        return places

    @classmethod
    def mam(
        cls,
        *,
        adapter: BottleneckAdapterConfig | None = None,
        prefix: PrefixTuningConfig | None = None,
        **more: Any,
    ) -> CompositeConfig:
        """Mix-and-match: a parallel adapter scaled by 4 and 30 prefixes.

        The paper's bottleneck of 512 stands in a model of size 1024; here it is half the model's
        size. Its other figures: prefixes from 800 hidden units, the adapter starting as 0.
        """
        start = BottleneckAdapterConfig(
            placement="parallel", reduction_factor=2, scale=4.0, start="lora"
        )
        return cls(
            adapter=start if adapter is None else adapter,
            prefix=PrefixTuningConfig(prefix_length=30, mid=800) if prefix is None else prefix,
            **more,
        )
