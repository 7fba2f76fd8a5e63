"""Modules: the parameters of an operator, their initialisation, and a forward that calls it."""

from .gate import Gate
from .gated_adapter import GatedAdapter
from .lora_linear import LoRALinear
from .prefix_attention import PrefixAttention

__all__ = ["Gate", "GatedAdapter", "LoRALinear", "PrefixAttention"]
