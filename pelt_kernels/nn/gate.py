"""The parameters of a learned gate, and its value where an operator is not to compute it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ops import LearnedGate
from ..ops._arguments import cast_activation
from ..ops._gate import POOLINGS, TOKEN, learned_gate, pool, quick_row_gates
from .packing import Packing

BRANCH_GATE = ""  # the name of a part's own gate among those of its input
# A gate's name among those of its input, and its value -> what takes the value's place.
GateRule = Callable[[str, Tensor], Tensor]


class Gate(nn.Module):
    """``g = pool_t( sigmoid( weight . x_t + bias ) )``, the scalar by which a part counts for a
    sentence.

    weight [D] starts as N(0, 0.02) and bias [1] as 0, so that a gate starts near 0.5. The operators
    compute the formula (`pelt_kernels.ops`), which read x anyway; this class only
    holds the gate's parameters.

    ``masked_mean`` pools over the real tokens, ``mean`` over all rows, padding included (what the
    official code of UniPELT does), ``token`` not at all. Paper: Mao et al., "UniPELT", ACL 2022.

    Raises:
        ValueError: a hidden size below 1 or an unknown pooling.
    """

    def __init__(
        self,
        hidden_size: int,
        pooling: str = "masked_mean",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if hidden_size < 1:
            raise ValueError(f"Gate: expected hidden_size >= 1, got {hidden_size}")
        if pooling not in POOLINGS:
            raise ValueError(
                f"Gate: expected pooling to be one of {', '.join(POOLINGS)}, got {pooling!r}"
            )
        self.pooling = pooling
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """weight ~ N(0, 0.02), bias = 0."""
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)

    def learned(self, mask: Tensor | Packing | None) -> LearnedGate:
        """The gate as an operator takes it.

        Without a mask every row is a real token, so both means are the same. Of packed sentences it
        is each token's own, which are pooled behind it (`Packing.means`).
        """
        if isinstance(mask, Packing):
            return LearnedGate(self.weight, self.bias, TOKEN)
        pooling = "mean" if mask is None and self.pooling == "masked_mean" else self.pooling
        return LearnedGate(self.weight, self.bias, pooling)

    def mask_for(self, mask: Tensor | Packing | None) -> Tensor | None:
        """The mask, if an operator reads it for this gate's pooling."""
        return mask if self.pooling == "masked_mean" and isinstance(mask, Tensor) else None

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, pooling={self.pooling!r}"


def value_of(gate: LearnedGate, x: Tensor, mask: Tensor | Packing | None) -> Tensor:
    """The value of a gate of x [..., D] by the operators' formula, composed of PyTorch operations:
    [B], or [B, S] for ``token``; float32, and float64 of a float64 x. It carries gradients.

    An operator computes the same on its own read of x; this is for a value that something is done
    to before it scales a part, and of packed sentences, over each of which `gate`, a token's, is
    pooled here.
    """
    if isinstance(mask, Packing):
        return mask.means(value_of(gate, x, None))
    x = cast_activation(x)
    x = x.flatten(1, -2) if x.ndim > 3 else x.reshape((1,) * (3 - x.ndim) + x.shape)
    with torch.autocast(x.device.type, enabled=False):
        if torch.is_grad_enabled():
            return learned_gate(x, gate.weight, gate.bias, gate.pooling, mask)
        return pool(quick_row_gates(x, gate.weight, gate.bias), gate.pooling, mask)


def may_select(x: Tensor) -> bool:
    """Whether the rows of x that a gate keeps may be looked for: on a CPU. On a GPU the host would
    wait for it, and torch.compile would break its graph.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling()
