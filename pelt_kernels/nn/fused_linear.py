"""A frozen Linear that computes several projections at once, with low-rank branches into some."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops import LoraBranch
from .experts import Bank, expert_banks
from .gate import Gate, GateRule
from .lora_linear import with_branches
from .original import Original, linear_kind
from .packing import Packing


class LowRank(nn.Module):
    """The branch ``alpha / R · (x Aᵀ) Bᵀ`` of one projection, or ``g(x) · (x Aᵀ) Bᵀ`` with a gate.

    lora_a [R, Din] starts as U(±1/sqrt(Din)), lora_b [Dout, R] as 0, as in `LoRALinear`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        alpha: float,
        gate_pooling: str | None = None,
        **placement: Any,
    ) -> None:
        super().__init__()
        self.scale = alpha / r
        self.lora_a = nn.Parameter(torch.empty(r, in_features, **placement))
        self.lora_b = nn.Parameter(torch.zeros(out_features, r, **placement))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.gate = None if gate_pooling is None else Gate(in_features, gate_pooling, **placement)

    def branch(self, offset: int, mask: Tensor | Packing | None) -> LoraBranch:
        """The branch into the columns from `offset` on."""
        if self.gate is None:
            return LoraBranch(self.lora_a, self.lora_b, offset, self.scale)
        return LoraBranch(self.lora_a, self.lora_b, offset, gate=self.gate.learned(mask))

    def update(self) -> tuple[Tensor, Tensor, float]:
        """A, B and the scale. Raises ValueError for a gated branch."""
        if self.gate is not None:
            raise ValueError(
                "LowRank: expected a branch without gate to merge, got a gated one, whose scale "
                "differs between sentences"
            )
        return self.lora_a, self.lora_b, self.scale


class ExpertLowRank(Bank):
    """The branch ``alpha / R · (x A^(j)ᵀ) B^(k)ᵀ`` of one projection with j and k drawn, as in
    `ExpertLoRALinear`.
    """

    SIDES = (("lora_a",), ("lora_b",))

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        alpha: float,
        sizes: tuple[int, int],
        identical_start: bool = False,
        **placement: Any,
    ) -> None:
        super().__init__()
        self.scale, self.gate = alpha / r, None
        self.lora_a, self.lora_b = expert_banks(
            in_features, out_features, r, sizes, identical_start, **placement
        )

    def branch(self, offset: int, mask: Tensor | Packing | None) -> LoraBranch:
        """The branch of this forward."""
        values, index = self.chosen()
        return LoraBranch(
            values["lora_a"], values["lora_b"], offset, scale=self.scale, bank_index=index
        )

    def update(self) -> tuple[Tensor, Tensor, float]:
        """The banks' means A and B, and the scale."""
        means = self.averages()
        return means["lora_a"], means["lora_b"], self.scale


class FusedLoRALinear(nn.Module):
    """``y = x Wᵀ + b``, plus a branch into the output columns of each of some projections: one read
    of x for all of them (GPT-2's query, key and value are one Conv1D).

    Weight and bias are the parameters of the Linear that it replaces, under the same names.

    Args:
        base: the Linear that it replaces.
        branches: a projection's name -> its `LowRank` or `ExpertLowRank`.
        offsets: a projection's name -> its first output column.
        dropout: on the branches' input while training.
        extra_gates: name -> gate, as in `LoRALinear`.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        base: nn.Module,
        branches: Mapping[str, LowRank | ExpertLowRank],
        offsets: Mapping[str, int],
        *,
        dropout: float = 0.0,
        extra_gates: Mapping[str, Gate] | None = None,
    ) -> None:
        super().__init__()
        self.original = Original(base, linear_kind(base))
        self.weight = cast(nn.Parameter, base.weight)
        self.register_parameter("bias", cast("nn.Parameter | None", base.bias))
        self.branches = nn.ModuleDict(dict(branches))
        self.offsets, self.dropout = dict(offsets), dropout
        self.extra_gates = nn.ModuleDict(dict(extra_gates or {}))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | Packing | None = None,
        *,
        return_gates: bool = False,
        rule: GateRule | None = None,
        skip_below: float | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """y [..., Dout]; with return_gates also the values of the gates by name, the branches' by
        their projection's.

        mask is [B, S] bool, True for real tokens, read by gates that pool with ``masked_mean``; or
        the `Packing` of x [1, T, Din], over whose sentences these pool. With a rule the gates are
        computed first, and what the rule makes of them are the gates. A branch counts for no row
        whose gate is below skip_below.
        """
        members = cast("dict[str, LowRank]", dict(self.branches.items()))
        branches = {n: member.branch(self.offsets[n], mask) for n, member in members.items()}
        extra = cast("dict[str, Gate]", dict(self.extra_gates.items()))
        y, values = with_branches(self, x, branches, extra, mask, self.dropout, rule, skip_below)
        return (y, values) if return_gates else y

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """The weight with every branch added to its columns, each computed in float64 and rounded
        once.

        Raises:
            ValueError: a gate, a 16-bit weight, or a Linear with a forward of its own.
        """
        self.original.check_mergeable()
        weight: Tensor = self.weight
        for name, member in self.branches.items():
            a, b, scale = cast(LowRank, member).update()
            weight = self.original.merged(weight, a, b, scale, self.offsets[name])
        return weight
