"""The bottleneck adapter with an optional gate."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops import LearnedGate, gated_adapter
from .gate import BRANCH_GATE, Gate, GateRule, value_of
from .packing import Packing


class GatedAdapter(nn.Module):
    """``y = residual + scale · g · dropout( W_up φ( W_down x + b_down ) + b_up )``, see
    `pelt_kernels.gated_adapter`.

    w_down [R, D] and w_up [D, R] start as N(0, 0.02), both biases as 0: not the identity at the
    start, but close to it; with ``start="lora"``, w_down starts as U(±1 / sqrt(D)) and w_up as 0,
    which is the identity. The gate, if there is one, is a `Gate` [D]. x is [B, S, D].

    Args:
        hidden_size: D.
        bottleneck: R.
        activation: relu, gelu (erf), gelu_tanh, silu, tanh or identity; checked by the operator.
        gate_pooling: None (no gate), ``masked_mean``, ``mean`` or ``token``.
        dropout: on the adapter's output, while training.
        scale: a constant factor.
        start: normal or lora.

    Raises:
        ValueError: sizes below 1, dropout outside [0, 1), an unknown pooling or start.

    Papers:
        Houlsby et al. 2019; Pfeiffer et al. 2021 (the position after the FFN); Mao et al. 2022 (the
        gate); He et al. 2022 (the scale and the other start).
    """

    def __init__(
        self,
        hidden_size: int,
        bottleneck: int,
        *,
        activation: str = "relu",
        gate_pooling: str | None = None,
        dropout: float = 0.0,
        scale: float = 1.0,
        start: str = "normal",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if hidden_size < 1 or bottleneck < 1:
            raise ValueError(
                f"GatedAdapter: expected hidden_size and bottleneck >= 1, got {hidden_size} and "
                f"{bottleneck}"
            )
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"GatedAdapter: expected dropout in [0, 1), got {dropout}")
        if start not in ("normal", "lora"):
            raise ValueError(f"GatedAdapter: expected start to be normal or lora, got {start!r}")
        self.activation, self.dropout, self.scale = activation, dropout, scale
        self.start = start
        self.w_down = nn.Parameter(torch.empty(bottleneck, hidden_size, device=device, dtype=dtype))
        self.b_down = nn.Parameter(torch.empty(bottleneck, device=device, dtype=dtype))
        self.w_up = nn.Parameter(torch.empty(hidden_size, bottleneck, device=device, dtype=dtype))
        self.b_up = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.gate = (
            None
            if gate_pooling is None
            else Gate(hidden_size, gate_pooling, device=device, dtype=dtype)
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The projections as `start` says, both biases = 0, and the gate's own start."""
        if self.start == "lora":
            nn.init.kaiming_uniform_(self.w_down, a=math.sqrt(5))
            nn.init.zeros_(self.w_up)
        else:
            nn.init.normal_(self.w_down, std=0.02)
            nn.init.normal_(self.w_up, std=0.02)
        nn.init.zeros_(self.b_down)
        nn.init.zeros_(self.b_up)
        if self.gate is not None:
            self.gate.reset_parameters()

    def forward(
        self,
        x: Tensor,
        *,
        residual: str | Tensor | None = "input",
        mask: Tensor | Packing | None = None,
        return_gate: bool = False,
        rule: GateRule | None = None,
        skip_below: float | None = None,
    ) -> Tensor | tuple[Tensor, Tensor | None]:
        """y [B, S, D]; with return_gate also the gate's value [B] (None without a gate).

        mask is [B, S] bool, True for real tokens; or the `Packing` of x [1, T, D]. With a rule, and
        of packed sentences, the gate is computed first, and what the rule makes of it is the gate.
        Rows whose gate is below skip_below have their residual as it is (without gradients only).
        """
        learned = None if self.gate is None else self.gate.learned(mask)
        value: Tensor | None = None
        gate: LearnedGate | Tensor | None = learned
        if learned is not None and (rule is not None or isinstance(mask, Packing)):
            value = value_of(learned, x, mask)
            value = value if rule is None else rule(BRANCH_GATE, value)
            gate = mask.over_tokens(value) if isinstance(mask, Packing) else value
        y = gated_adapter(
            x,
            self.w_down,
            self.w_up,
            b_down=self.b_down,
            b_up=self.b_up,
            activation=self.activation,
            scale=self.scale,
            gate=gate,
            mask=None if self.gate is None else self.gate.mask_for(mask),
            residual=residual,
            dropout_p=self.dropout if self.training else 0.0,
            skip_below=None if learned is None else skip_below,
            return_gate=return_gate and value is None,
        )
        if value is None or not return_gate:
            return y
        assert isinstance(y, Tensor)
        return y, value.detach()

    def extra_repr(self) -> str:
        bottleneck, hidden_size = self.w_down.shape
        return (
            f"{hidden_size}, {bottleneck}, activation={self.activation!r}, dropout={self.dropout}"
        )
