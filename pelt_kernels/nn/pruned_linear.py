"""A Linear whose frozen weight is updated by a low-rank product and pruned by learned scores."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops import masked_weight
from ..ops.masked_weight import kept_entries
from .original import Original


class PrunedLinear(nn.Module):
    """``y = x (mask ⊙ (W0 + β U V))ᵀ + b``, see `pelt_kernels.masked_weight`.

    W0 and b are the parameters of the `nn.Linear` that it replaces, under the same names. U [n, r1]
    and A [n, r2] start as N(0, 1); V, B, R and C start as 0, so that W = W0 and the scores are |W0|
    at the start. ``sparsity`` may change at any time. Each forward computes the weight again, in
    evaluation too, so that it is never out of date. With thousands of tokens this costs little
    beside their product; with one sentence it takes most of the time, and
    `PeltModel.export_dense` writes the weight once for inference.

    Args:
        base: the Linear. r1, r2: ranks. beta, alpha1, alpha2: factors. sparsity: at the start.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        base: nn.Linear,
        r1: int = 8,
        r2: int = 8,
        *,
        beta: float = 1.0,
        alpha1: float = 1.0,
        alpha2: float = 1.0,
        sparsity: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.beta, self.alpha1, self.alpha2, self.sparsity = beta, alpha1, alpha2, sparsity
        self.original = Original(base, nn.Linear)
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        out, into = base.weight.shape
        # Stored as a number, because in a trace a tensor's sizes are tensors.
        self.entries = out * into

        def zeros(*shape: int) -> nn.Parameter:
            dtype_or_base = dtype or base.weight.dtype
            return nn.Parameter(torch.zeros(shape, device=base.weight.device, dtype=dtype_or_base))

        self.update_u, self.update_v = zeros(out, r1), zeros(r1, into)
        self.score_a, self.score_b = zeros(out, r2), zeros(r2, into)
        self.score_row, self.score_col = zeros(out), zeros(into)
        nn.init.normal_(self.update_u)
        nn.init.normal_(self.score_a)

    @property
    def keep(self) -> int:
        """How many entries stay at the present sparsity."""
        return kept_entries(self.entries, self.sparsity)

    def pruned_weight(self) -> Tensor:
        """mask ⊙ (W0 + β U V), [n, k]."""
        return masked_weight(
            self.weight,
            self.update_u,
            self.update_v,
            self.score_a,
            self.score_b,
            self.score_row,
            self.score_col,
            self.keep,
            beta=self.beta,
            alpha1=self.alpha1,
            alpha2=self.alpha2,
        )

    def forward(self, x: Tensor) -> Tensor:
        """y [..., n]."""
        weight = self.pruned_weight()
        if self.original.is_plain:
            return nn.functional.linear(x, weight, self.bias)
        return self.original(self, x, weight)
