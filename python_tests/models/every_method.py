"""Every method in sizes for the tiny encoders of the tests."""

from __future__ import annotations

from pelt_kernels.methods import (
    AdaMixConfig,
    BitFitConfig,
    BottleneckAdapterConfig,
    CompositeConfig,
    ControlPrefixesConfig,
    FullConfig,
    HeadConfig,
    HyperPELTConfig,
    LoraConfig,
    MethodConfig,
    PrefixTuningConfig,
    PSTConfig,
    UniPELTConfig,
    VLMConfig,
)

ADAPTER = BottleneckAdapterConfig(bottleneck=4)
PARALLEL = BottleneckAdapterConfig(bottleneck=4, placement="parallel", scale=4.0, start="lora")
PREFIX = PrefixTuningConfig(prefix_length=3, mid=8)
LORA = LoraConfig(r=4)
PRUNED = PSTConfig(sparsity=0.5, r1=3, r2=2, targets=("ffn_in", "ffn_out"), end=0.5)
EXPERTS = AdaMixConfig(kind="lora", experts=3, r=2, targets=("query", "value"))

COMPOSITES: dict[str, CompositeConfig] = {
    "mam": CompositeConfig.mam(adapter=PARALLEL, prefix=PREFIX),
    "composite": CompositeConfig(
        adapter=BottleneckAdapterConfig(bottleneck=4, placement="parallel", gated=True),
        prefix=PrefixTuningConfig(prefix_length=3, mid=8, gated=True),
        lora=LoraConfig(r=4, targets=("value", "attention_output", "ffn_in")),
        bitfit=True,
    ),
}
METHODS: dict[str, MethodConfig] = {
    "unipelt": UniPELTConfig(adapter=ADAPTER, prefix=PREFIX, lora=LORA),
    "unipelt-ap": UniPELTConfig(adapter=ADAPTER, prefix=PREFIX, lora=None),
    "adapter": ADAPTER,
    "parallel-adapter": PARALLEL,
    "prefix": PREFIX,
    "control-prefixes": ControlPrefixesConfig(prefix_length=3, mid=8),
    "lora": LORA,
    "adamix": AdaMixConfig(reduction_factor=8),
    "adamix-both-banks": AdaMixConfig(reduction_factor=8, share_up=False),
    "adamix-lora": EXPERTS,
    "pst": PSTConfig(sparsity=0.8, r1=3, r2=2),
    "vlm": VLMConfig(bottlenecks=(4,)),
    "hyperpelt": HyperPELTConfig(bottleneck=4, prefix_length=3),
    "bitfit": BitFitConfig(),
    **COMPOSITES,
    "composite-pst": CompositeConfig(
        adapter=ADAPTER, lora=LoraConfig(r=4, targets=("query",)), bitfit=True, pst=PRUNED
    ),
    "composite-adamix": CompositeConfig(
        adapter=PARALLEL, prefix=PREFIX, adamix=EXPERTS, pst=PRUNED
    ),
    "head": HeadConfig(),
    "full": FullConfig(),
}
