"""A frozen Linear with a low-rank branch, and the gates that are computed from the same input."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..ops import LearnedGate, LoraBranch, lora_linear
from .beside import add_branches
from .gate import BRANCH_GATE, Gate, GateRule, may_select, value_of
from .original import (
    Original,
    dtype_beside,
    linear_kind,
    product,
    sizes_of,
    why_not_replaceable,
)
from .packing import Packing


def with_branches(
    linear: Any,
    x: Tensor,
    branches: Mapping[str, LoraBranch],
    extra_gates: Mapping[str, Gate] | None = None,
    mask: Tensor | Packing | None = None,
    dropout: float = 0.0,
    rule: GateRule | None = None,
    skip_below: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """A stand-in's Linear and its branches on one read of x: y, and the values of the gates by
    name, the extra gates' with gradients and the branches' own without.

    Args:
        linear: holds `original`, `weight` and `bias`.
        mask: [B, S] bool, True for real tokens; or the `Packing` of x [1, T, D].
        rule: what it makes of a gate's value is the gate.
        skip_below: a branch counts for no row whose gate is below it.
    """
    extra_gates = extra_gates or {}
    gates: dict[str, Tensor] = {}
    packing, padding = (mask, None) if isinstance(mask, Packing) else (None, mask)
    if rule is not None or skip_below is not None or packing is not None:
        for name, branch in branches.items():
            if isinstance(branch.gate, LearnedGate):
                value = value_of(branch.gate, x, mask)
                gates[name] = value if rule is None else rule(name, value)
        branches = _with_values(branches, gates, skip_below, packing)
    learned = tuple([gate.learned(mask) for gate in extra_gates.values()])
    y, extra_values, own_values = _with_branches(
        linear, x, tuple(branches.values()), learned, padding, dropout
    )
    if packing is not None:
        extra_values = tuple([packing.means(value) for value in extra_values])
    values = dict(zip(extra_gates, extra_values))
    if rule is not None:
        values = {name: rule(name, value) for name, value in values.items()}
    values |= {name: value.detach() for name, value in gates.items()}
    values |= {name: own for name, own in zip(branches, own_values) if own is not None}
    return y, values


def _with_values(
    branches: Mapping[str, LoraBranch],
    gates: Mapping[str, Tensor],
    skip_below: float | None,
    packing: Packing | None,
) -> dict[str, LoraBranch]:
    """The branches with these values as their gates, of packed sentences for all their tokens.

    Where it may be asked, one that no row has is left out; a row of another one has 0, because the
    operator multiplies all rows of x at once: to pick out the rows that keep a branch took from
    0.94 to 1.05 of that, where a quarter to three quarters of 32 texts keep it (18 and 128 tokens,
    D = 384, R = 8, a thread of an AMD EPYC, AVX2).
    """
    made = {}
    for name, branch in branches.items():
        gate = gates.get(name)
        if gate is not None and skip_below is not None:
            is_skipped = gate < skip_below
            if may_select(gate) and is_skipped.all():
                continue
            gate = gate.masked_fill(is_skipped, 0.0)
        if gate is not None and packing is not None:
            gate = packing.over_tokens(gate)
        made[name] = branch if gate is None else branch._replace(gate=gate)
    return made


def _with_branches(
    linear: Any,
    x: Tensor,
    branches: Sequence[LoraBranch],
    learned: tuple[LearnedGate, ...],
    mask: Tensor | None,
    dropout: float,
) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """y, the values of the extra gates, and those of the branches' learned gates."""
    original = linear.original
    if not branches and not learned:
        if not original.is_plain:
            return original(linear, x), (), ()
        return product(x, linear.weight, linear.bias, original.is_transposed), (), ()
    if not learned and all(branch.gate is None for branch in branches):
        y = _without_gates(linear, x, branches, dropout)
        return y, (), (None,) * len(branches)
    read_mask = None
    for each in (*learned, *[branch.gate for branch in branches]):
        if isinstance(each, LearnedGate) and each.pooling == "masked_mean":
            read_mask = mask
    p = dropout if linear.training else 0.0
    if not original.is_plain:
        return add_branches(original(linear, x), x, branches, learned, read_mask, p)
    y, extra_values, own_values = lora_linear(
        x,
        linear.weight,
        linear.bias,
        branches,
        extra_gates=learned,
        mask=read_mask,
        transposed=original.is_transposed,
        dropout_p=p,
        return_gates=True,
    )
    return y, extra_values, own_values


def _without_gates(
    linear: Any, x: Tensor, branches: Sequence[LoraBranch], dropout: float
) -> Tensor:
    """`with_branches` where no gate is: the shortest way, as a narrow layer is done within what the
    other takes.
    """
    original = linear.original
    p = dropout if linear.training else 0.0
    if not original.is_plain:
        return add_branches(original(linear, x), x, branches, dropout_p=p)[0]
    y: Tensor = lora_linear(
        x, linear.weight, linear.bias, branches, transposed=original.is_transposed, dropout_p=p
    )
    return y


class LoRALinear(nn.Module):
    """``y = x Wᵀ + b + s · (dropout(x) Aᵀ) Bᵀ``, with s = alpha / R, or s = the gate g(x), which
    replaces alpha / R.

    W [Dout, Din] (a Conv1D's: [Din, Dout]) and b [Dout] are the parameters of the Linear that it
    replaces, under the same names, so the base model's state_dict does not change; they are frozen,
    also in the Linear itself, whose own they still are. lora_a [R, Din]
    starts as U(±1/sqrt(Din)) (Kaiming uniform with a = sqrt 5), lora_b [Dout, R] as 0: the branch
    is exactly 0 at the start. A Linear with hooks or a forward of its own, and a quantised one, is
    called for ``x Wᵀ + b``, to which the branch is added; its hooks see that output.

    Extra gates do not scale this layer; their values are returned for another part whose gate has
    the same input (UniPELT's prefix is gated by the attention's input, which the query's Linear
    reads anyway). R = 0 means no branch.

    Args:
        base: the Linear that it replaces, or transformers' Conv1D (GPT-2); bitsandbytes' and
            torchao's quantised Linears, too.
        r, alpha, dropout: rank R, the numerator of the scale, dropout on the branch's input while
            training.
        gate_pooling: None (no gate), ``masked_mean``, ``mean`` or ``token``.
        extra_gates: name -> pooling.
        dtype: of the new parameters; None: W's, float32 beside a quantised W.
        freeze: whether W and b stop requiring a gradient; False leaves that to the caller.

    Raises:
        TypeError: base is neither, or has no floating-point weight. ValueError: r < 0, dropout
            outside [0, 1).

    Papers: Hu et al. 2022 (LoRA); Mao et al. 2022 (the gates).
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        base: Any,
        r: int = 8,
        alpha: float = 16.0,
        *,
        dropout: float = 0.0,
        gate_pooling: str | None = None,
        extra_gates: Mapping[str, str] | None = None,
        dtype: torch.dtype | None = None,
        freeze: bool = True,
    ) -> None:
        super().__init__()
        kind = linear_kind(base)
        reason = why_not_replaceable(base, kind)
        if reason:
            raise TypeError(
                "LoRALinear: expected base as an nn.Linear with floating-point weight and bias, "
                f"got {reason}"
            )
        if r < 0:
            raise ValueError(f"LoRALinear: expected r >= 0, got {r}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"LoRALinear: expected dropout in [0, 1), got {dropout}")
        self.in_features, self.out_features = sizes_of(base)
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.original = Original(base, kind)
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        if freeze:
            self.requires_grad_(False)
        placement: dict[str, Any] = {
            "device": base.weight.device,
            "dtype": dtype or dtype_beside(base),
        }
        self.gate = (
            None
            if gate_pooling is None or r == 0
            else Gate(self.in_features, gate_pooling, **placement)
        )
        self.extra_gates = nn.ModuleDict(
            {
                name: Gate(self.in_features, pooling, **placement)
                for name, pooling in (extra_gates or {}).items()
            }
        )
        self._has_branch_alone = r > 0 and self.gate is None and not self.extra_gates
        if r:
            self.lora_a = nn.Parameter(torch.empty(r, self.in_features, **placement))
            self.lora_b = nn.Parameter(torch.empty(self.out_features, r, **placement))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """lora_a ~ U(±1/sqrt(Din)), lora_b = 0, the gates' own start; the frozen weight stays."""
        if self.r:
            nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
            nn.init.zeros_(self.lora_b)
        for gate in self._gates():
            gate.reset_parameters()

    def _gates(self) -> list[Gate]:
        """The extra gates in order, then the branch's own."""
        gates = [cast(Gate, gate) for gate in self.extra_gates.values()]
        return gates if self.gate is None else [*gates, self.gate]

    def forward(
        self,
        x: Tensor,
        mask: Tensor | Packing | None = None,
        *,
        return_gates: bool = False,
        rule: GateRule | None = None,
        skip_below: float | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """y [..., Dout]; with return_gates also the values [B] of the gates by name, of which the
        branch's own is `BRANCH_GATE`.

        mask is [B, S] bool, True for real tokens, read by gates that pool with ``masked_mean``; or
        the `Packing` of x [1, T, Din], over whose sentences these pool. With a rule the gates are
        computed first, and what the rule makes of them are the gates. The branch counts for no row
        whose gate is below skip_below.
        """
        if self._has_branch_alone:
            branch = LoraBranch(self.lora_a, self.lora_b, 0, self.alpha / self.r)
            y = _without_gates(self, x, (branch,), self.dropout)
            return (y, {}) if return_gates else y
        branches = {}
        if self.r:
            gate = self.gate
            scale = self.alpha / self.r if gate is None else 1.0
            learned = None if gate is None else gate.learned(mask)
            branch = LoraBranch(self.lora_a, self.lora_b, scale=scale, gate=learned)
            branches[BRANCH_GATE] = branch
        extra = cast("Mapping[str, Gate]", dict(self.extra_gates.items()))
        y, values = with_branches(self, x, branches, extra, mask, self.dropout, rule, skip_below)
        return (y, values) if return_gates else y

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """``W + alpha / R · B A`` in W's layout, computed in float64 and rounded once.

        Raises:
            ValueError: a gate, a 16-bit W, which would round the update away, or a Linear with a
                forward of its own.
        """
        self.original.check_mergeable()
        if self.gate is not None:
            raise ValueError(
                "LoRALinear: expected a branch without gate to merge, got a gated one, whose scale "
                "differs between sentences"
            )
        if not self.r:
            return self.weight
        scale = self.alpha / self.r
        return self.original.merged(self.weight, self.lora_a, self.lora_b, scale)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, r={self.r}, alpha={self.alpha}, "
            f"dropout={self.dropout}"
        )
