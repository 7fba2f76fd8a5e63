"""BitFit: only the bias terms are trained (Ben Zaken et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ._config import MethodConfig


@dataclass(frozen=True, kw_only=True)
class BitFitConfig(MethodConfig):
    """Every parameter whose name contains ``bias``, LayerNorms included, and the classification
    head.

    Nothing is added to the model. The biases are trained in place; their first values are kept, so
    that `PeltModel.disable_adapter` and `PeltModel.remove` can give them back.
    """

    method: ClassVar[str] = "bitfit"
