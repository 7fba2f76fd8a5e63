"""Modules: the parameters of an operator, their initialisation, and a forward that calls it."""

from .experts import Bank, ExpertAdapter, ExpertLoRALinear, spare_unselected
from .gate import Gate
from .gated_adapter import GatedAdapter
from .lora_linear import LoRALinear
from .prefix_attention import PrefixAttention
from .pruned_linear import PrunedLinear

__all__ = [
    "Bank",
    "ExpertAdapter",
    "ExpertLoRALinear",
    "Gate",
    "GatedAdapter",
    "LoRALinear",
    "PrefixAttention",
    "PrunedLinear",
    "spare_unselected",
]
