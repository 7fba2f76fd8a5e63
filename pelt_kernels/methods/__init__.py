"""Methods as data: one immutable config for each, checked when made."""

from ._config import METHODS, MethodConfig, config_from_dict, with_part_changes
from .adamix import AdaMixConfig
from .adapter import BottleneckAdapterConfig
from .baselines import FullConfig, HeadConfig
from .bitfit import BitFitConfig
from .composite import CompositeConfig
from .control_prefixes import ControlPrefixesConfig
from .hyperpelt import HyperPELTConfig
from .lora import LoraConfig
from .options import config_from_options
from .parts import Parts, parts_of
from .prefix import PrefixTuningConfig
from .pst import PSTConfig
from .registry import PRESETS, make_config
from .unipelt import UniPELTConfig
from .vlm import VLMConfig

__all__ = [
    "METHODS",
    "PRESETS",
    "AdaMixConfig",
    "BitFitConfig",
    "BottleneckAdapterConfig",
    "CompositeConfig",
    "ControlPrefixesConfig",
    "FullConfig",
    "HeadConfig",
    "HyperPELTConfig",
    "LoraConfig",
    "MethodConfig",
    "PSTConfig",
    "Parts",
    "PrefixTuningConfig",
    "UniPELTConfig",
    "VLMConfig",
    "config_from_dict",
    "config_from_options",
    "make_config",
    "parts_of",
    "with_part_changes",
]
