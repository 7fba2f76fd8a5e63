"""The operators and the means to choose and ask for their backends."""

from ._dispatch import BACKENDS, BackendError, explain, forget_choices, support_table, use_backend
from ._gate import LearnedGate
from .gated_adapter import Norm, gated_adapter

__all__ = [
    "BACKENDS",
    "BackendError",
    "LearnedGate",
    "Norm",
    "explain",
    "forget_choices",
    "gated_adapter",
    "support_table",
    "use_backend",
]
