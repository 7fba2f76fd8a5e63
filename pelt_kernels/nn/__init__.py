"""Modules: the parameters of an operator, their initialisation, and a forward that calls it."""

from .experts import Bank, ExpertAdapter, ExpertLoRALinear, spare_unselected
from .fused_linear import ExpertLowRank, FusedLoRALinear, LowRank
from .gate import Gate
from .gated_adapter import GatedAdapter
from .generated_weights import GeneratedWeights, HyperCall, StoredWeights
from .hypernetwork import (
    AdapterWeights,
    HyperNetwork,
    PrefixWeights,
    StackSizes,
    TaskEmbeddings,
    generated_adapter,
)
from .lora_linear import LoRALinear
from .prefix_attention import PrefixAttention
from .pruned_linear import FusedPrunedLinear, PrunedLinear, Pruning
from .task_adapters import TaskAdapters

__all__ = [
    "AdapterWeights",
    "Bank",
    "ExpertAdapter",
    "ExpertLoRALinear",
    "ExpertLowRank",
    "FusedLoRALinear",
    "FusedPrunedLinear",
    "Gate",
    "GatedAdapter",
    "GeneratedWeights",
    "HyperCall",
    "HyperNetwork",
    "LoRALinear",
    "LowRank",
    "PrefixAttention",
    "PrefixWeights",
    "PrunedLinear",
    "Pruning",
    "StackSizes",
    "StoredWeights",
    "TaskAdapters",
    "TaskEmbeddings",
    "generated_adapter",
    "spare_unselected",
]
