"""Fused kernels for parameter-efficient tuning of transformers.

Names below load on first use, so that importing the package costs nothing and needs neither a
compiled module nor a GPU, Triton or transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._lazy import on_first_use
from ._version import __version__

if TYPE_CHECKING:
    from .integrations import accelerate, accelerated, restore
    from .methods import (
        METHODS,
        AdaMixConfig,
        BitFitConfig,
        BottleneckAdapterConfig,
        CompositeConfig,
        ControlPrefixesConfig,
        FullConfig,
        HeadConfig,
        HyperPELTConfig,
        LoraConfig,
        PrefixTuningConfig,
        PSTConfig,
        UniPELTConfig,
        VLMConfig,
        config_from_dict,
        make_config,
    )
    from .models import (
        AutoPeltModel,
        AutoPeltModelForCausalLM,
        AutoPeltModelForQuestionAnswering,
        AutoPeltModelForSeq2SeqLM,
        AutoPeltModelForSequenceClassification,
        AutoPeltModelForTokenClassification,
        PeltModel,
        get_pelt_model,
    )
    from .ops import (
        LearnedGate,
        LoraBranch,
        Norm,
        Prefix,
        explain,
        gated_adapter,
        lora_linear,
        masked_weight,
        prefix_attention,
        symmetric_kl,
        use_backend,
    )

__all__ = [
    "METHODS",
    "AdaMixConfig",
    "AutoPeltModel",
    "AutoPeltModelForCausalLM",
    "AutoPeltModelForQuestionAnswering",
    "AutoPeltModelForSeq2SeqLM",
    "AutoPeltModelForSequenceClassification",
    "AutoPeltModelForTokenClassification",
    "BitFitConfig",
    "BottleneckAdapterConfig",
    "CompositeConfig",
    "ControlPrefixesConfig",
    "FullConfig",
    "HeadConfig",
    "HyperPELTConfig",
    "LearnedGate",
    "LoraBranch",
    "LoraConfig",
    "Norm",
    "PSTConfig",
    "PeltModel",
    "Prefix",
    "PrefixTuningConfig",
    "UniPELTConfig",
    "VLMConfig",
    "__version__",
    "accelerate",
    "accelerated",
    "config_from_dict",
    "explain",
    "gated_adapter",
    "get_pelt_model",
    "lora_linear",
    "make_config",
    "masked_weight",
    "prefix_attention",
    "restore",
    "symmetric_kl",
    "use_backend",
]

__getattr__, __dir__ = on_first_use(globals(), ("ops", "methods", "integrations", "models"))
