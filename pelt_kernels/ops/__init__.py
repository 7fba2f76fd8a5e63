"""The operators and the means to choose and ask for their backends."""

from ._dispatch import (
    BACKENDS,
    BackendError,
    Choice,
    explain,
    forget_choices,
    support_table,
    use_backend,
)
from ._gate import LearnedGate
from .gated_adapter import Norm, gated_adapter
from .lora_linear import LoraBranch, lora_linear
from .masked_weight import masked_weight
from .prefix_attention import Prefix, prefix_attention
from .symmetric_kl import symmetric_kl

OPERATORS = ("gated_adapter", "prefix_attention", "lora_linear", "masked_weight", "symmetric_kl")

__all__ = [
    "BACKENDS",
    "OPERATORS",
    "BackendError",
    "Choice",
    "LearnedGate",
    "LoraBranch",
    "Norm",
    "Prefix",
    "explain",
    "forget_choices",
    "gated_adapter",
    "lora_linear",
    "masked_weight",
    "prefix_attention",
    "support_table",
    "symmetric_kl",
    "use_backend",
]
