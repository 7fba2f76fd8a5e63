"""Methods as data: one immutable config for each, checked when made."""

from ._config import MethodConfig, Parts, with_part_changes
from .adamix import AdaMixConfig
from .adapter import BottleneckAdapterConfig
from .baselines import FullConfig, HeadConfig
from .bitfit import BitFitConfig
from .composite import CompositeConfig
from .lora import LoraConfig
from .options import config_from_options
from .prefix import PrefixTuningConfig
from .pst import PSTConfig
from .registry import METHODS, PRESETS, config_from_dict, make_config
from .unipelt import UniPELTConfig

__all__ = [
    "METHODS",
    "PRESETS",
    "AdaMixConfig",
    "BitFitConfig",
    "BottleneckAdapterConfig",
    "CompositeConfig",
    "FullConfig",
    "HeadConfig",
    "LoraConfig",
    "MethodConfig",
    "PSTConfig",
    "Parts",
    "PrefixTuningConfig",
    "UniPELTConfig",
    "config_from_dict",
    "config_from_options",
    "make_config",
    "with_part_changes",
]
