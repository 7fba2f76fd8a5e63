"""The methods by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ._config import METHODS, MethodConfig
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

METHODS.update(
    (config.method, config)
    for config in (
        UniPELTConfig,
        BottleneckAdapterConfig,
        PrefixTuningConfig,
        ControlPrefixesConfig,
        LoraConfig,
        AdaMixConfig,
        PSTConfig,
        VLMConfig,
        HyperPELTConfig,
        BitFitConfig,
        CompositeConfig,
        HeadConfig,
        FullConfig,
    )
)

PRESETS: dict[str, Callable[..., MethodConfig]] = {
    **METHODS,
    "unipelt-ap": UniPELTConfig.ap,
    "mam": CompositeConfig.mam,
}


def make_config(name: str, **options: Any) -> MethodConfig:
    """The config of a method or preset by name, such as ``make_config("lora", r=4)`` or
    ``make_config("unipelt-ap")``.

    Raises:
        ValueError: an unknown name, an unknown option, or a value the config refuses.
    """
    if name not in PRESETS:
        raise ValueError(
            f"make_config: expected a method out of {', '.join(PRESETS)}, got {name!r}"
        )
    try:
        return PRESETS[name](**options)
    except TypeError as error:
        raise ValueError(
            f"make_config: the method {name!r} does not take these options: {error}"
        ) from error
