"""A Linear whose frozen weight is updated by a low-rank product and pruned by learned scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops import masked_weight
from ..ops.masked_weight import kept_entries
from .original import Original, linear_kind, sizes_of


class Pruning(nn.Module):
    """``mask ⊙ (W0 + β U V)`` of one matrix W0 [n, k], see `pelt_kernels.masked_weight`.

    U [n, r1] and A [n, r2] start as N(0, 1); V, B, R and C start as 0, so that W = W0 and the
    scores are |W0| at the start. ``sparsity`` may change at any time.

    Args:
        out, into: n and k. r1, r2: ranks. beta, alpha1, alpha2: factors. sparsity: at the start.
    """

    def __init__(
        self,
        out: int,
        into: int,
        r1: int = 8,
        r2: int = 8,
        *,
        beta: float = 1.0,
        alpha1: float = 1.0,
        alpha2: float = 1.0,
        sparsity: float = 0.0,
        **placement: Any,
    ) -> None:
        super().__init__()
        self.beta, self.alpha1, self.alpha2, self.sparsity = beta, alpha1, alpha2, sparsity
        # Stored as a number, because in a trace a tensor's sizes are tensors.
        self.entries = out * into

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, **placement))

        self.update_u, self.update_v = zeros(out, r1), zeros(r1, into)
        self.score_a, self.score_b = zeros(out, r2), zeros(r2, into)
        self.score_row, self.score_col = zeros(out), zeros(into)
        nn.init.normal_(self.update_u)
        nn.init.normal_(self.score_a)

    @property
    def keep(self) -> int:
        """How many entries stay at the present sparsity."""
        return kept_entries(self.entries, self.sparsity)

    def pruned(self, w0: Tensor) -> Tensor:
        """mask ⊙ (W0 + β U V), [n, k]."""
        return masked_weight(
            w0,
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


class PrunedLinear(Pruning):
    """``y = x (mask ⊙ (W0 + β U V))ᵀ + b``, see `Pruning`.

    W0 and b are the parameters of the Linear that it replaces (an `nn.Linear` or a Conv1D), under
    the same names. Each forward computes the weight again, in evaluation too, so that it is never
    out of date. With thousands of tokens this costs little beside their product; with one sentence
    it takes most of the time, and `PeltModel.export_dense` writes the weight once for inference.

    Args:
        base: the Linear. dtype: of the new parameters; None: the weight's.
        r1, r2, options: as in `Pruning`.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        base: nn.Module,
        r1: int = 8,
        r2: int = 8,
        *,
        dtype: torch.dtype | None = None,
        **options: float,
    ) -> None:
        into, out = sizes_of(base)
        weight = cast(nn.Parameter, base.weight)
        placement: dict[str, Any] = {"device": weight.device, "dtype": dtype or weight.dtype}
        super().__init__(out, into, r1, r2, **options, **placement)
        self.original = Original(base, linear_kind(base))
        self.weight = weight
        self.register_parameter("bias", cast("nn.Parameter | None", base.bias))

    def pruned_weight(self) -> Tensor:
        """The weight as the forward uses it, in the layout of W0's module."""
        return self.original.laid_out(self._rows())

    def _rows(self) -> Tensor:
        return self.pruned(self.original.laid_out(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        """y [..., n]."""
        return pruned_product(self, x, self._rows())


class FusedPrunedLinear(nn.Module):
    """One Linear that computes several projections, whose matrices W0 [n, k] are pruned each by
    itself, as `Pruning` does; a projection without one keeps its W0.

    Weight and bias are the parameters of the Linear that it replaces, under the same names.

    Args:
        base: the Linear that it replaces.
        matrices: a projection's name -> its `Pruning`.
        offsets: a projection's name -> its first output column.
    """

    bias: nn.Parameter | None

    def __init__(
        self, base: nn.Module, matrices: Mapping[str, Pruning], offsets: Mapping[str, int]
    ) -> None:
        super().__init__()
        self.original = Original(base, linear_kind(base))
        self.weight = cast(nn.Parameter, base.weight)
        self.register_parameter("bias", cast("nn.Parameter | None", base.bias))
        self.matrices = nn.ModuleDict(dict(matrices))
        self.offsets = dict(offsets)

    def pruned_weight(self) -> Tensor:
        """The whole weight as the forward uses it, in the layout of W0's module."""
        return self.original.laid_out(self._rows())

    def pruned_parts(self) -> dict[str, Tensor]:
        """The pruned matrices [n, k] by their projections' names."""
        rows = self.original.laid_out(self.weight)
        parts = {}
        for name, module in self.matrices.items():
            matrix = cast(Pruning, module)
            offset = self.offsets[name]
            parts[name] = matrix.pruned(rows[offset : offset + len(matrix.score_row)])
        return parts

    def _rows(self) -> Tensor:
        rows, done, pieces = self.original.laid_out(self.weight), 0, []
        for name, part in sorted(self.pruned_parts().items(), key=self._offset):
            offset = self.offsets[name]
            pieces += [rows[done:offset], part]
            done = offset + len(part)
        return torch.cat([*pieces, rows[done:]])

    def _offset(self, named: tuple[str, Tensor]) -> int:
        return self.offsets[named[0]]

    def forward(self, x: Tensor) -> Tensor:
        """y [..., Dout]."""
        return pruned_product(self, x, self._rows())


def pruned_product(linear: PrunedLinear | FusedPrunedLinear, x: Tensor, rows: Tensor) -> Tensor:
    """``x Wᵀ + b`` of a pruned weight [Dout, Din], by the Linear itself where it has hooks."""
    if linear.original.is_plain:
        return nn.functional.linear(x, rows, linear.bias)
    return linear.original(linear, x, linear.original.laid_out(rows))
