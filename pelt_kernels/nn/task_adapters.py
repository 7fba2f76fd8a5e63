"""An adapter of each task behind a LayerNorm of its own, chosen for each sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..ops import Norm, gated_adapter
from .experts import Members

BYPASS = -1  # the task that passes an adapter by
NAMES = ("norm_weight", "norm_bias", "w_down", "b_down", "w_up", "b_up")


class TaskAdapters(Members):
    """``y = x + W_up[t] relu( W_down[t] LN[t](x) + b_down[t] ) + b_up[t]`` with t the sample's
    task.

    One batch may mix tasks. The task -1 passes the adapter by: y = x. Each projection starts as
    N(0, 0.02), biases as 0, each LayerNorm as (1, 0).

    Tasks may have bottlenecks of their own. The banks are as high as the largest, R; the rows of a
    task beyond its own are 0, and training leaves them at exactly 0, because relu and its slope are
    0 at 0: such a row of W_down gets no gradient through relu, and such a column of W_up is
    multiplied by 0.

    Args:
        hidden_size: D.
        bottlenecks: one for each task.
        eps: of the LayerNorms; the host model's.

    Raises:
        ValueError: no task, or a size below 1.

    Paper: Lin, Madotto and Fung, "Exploring Versatile Generative Language Model Via
    Parameter-Efficient Transfer Learning", Findings of EMNLP 2020. Its code takes one task a batch.
    """

    def __init__(
        self,
        hidden_size: int,
        bottlenecks: Sequence[int],
        *,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not bottlenecks or min(hidden_size, *bottlenecks) < 1:
            raise ValueError(
                "TaskAdapters: expected hidden_size >= 1 and a bottleneck >= 1 for each task, got "
                f"{hidden_size} and {list(bottlenecks)}"
            )
        self.bottlenecks, self.eps = tuple(bottlenecks), eps
        m, r, d = len(bottlenecks), max(bottlenecks), hidden_size

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.norm_weight, self.norm_bias = empty(m, d), empty(m, d)
        self.w_down, self.b_down = empty(m, r, d), empty(m, r)
        self.w_up, self.b_up = empty(m, d, r), empty(m, d)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """W ~ N(0, 0.02) within each task's bottleneck, 0 beyond; biases 0; LayerNorms (1, 0)."""
        nn.init.ones_(self.norm_weight)
        for bias in (self.norm_bias, self.b_down, self.b_up):
            nn.init.zeros_(bias)
        for weight in (self.w_down, self.w_up):
            nn.init.normal_(weight, std=0.02)
        for task, bottleneck in enumerate(self.bottlenecks):
            self.w_down[task, bottleneck:] = 0
            self.w_up[task, :, bottleneck:] = 0

    def banks(self) -> dict[str, nn.Parameter]:
        """Every parameter: all have one entry for each task."""
        return {name: getattr(self, name) for name in NAMES}

    def forward(self, x: Tensor, tasks: Tensor | int) -> Tensor:
        """y [B, S, D] of x [B, S, D] and tasks, int64 [B], or [] or a number for the whole batch.

        Values of a tensor are not looked at here, beyond what the operator does.
        """
        values: dict[str, Tensor] = {**self.banks()}
        index = gate = None
        if isinstance(tasks, int):
            if tasks == BYPASS:
                return x
            values = {name: bank[tasks] for name, bank in values.items()}
        else:
            # A gate of 0 removes the adapter of a passed sample from y and from every gradient.
            index, gate = tasks.clamp(min=0), (tasks != BYPASS).to(x.dtype).expand(x.shape[0])
            if len(self.bottlenecks) == 1:
                values, index = {name: bank[0] for name, bank in values.items()}, None
        y = gated_adapter(
            x,
            values["w_down"],
            values["w_up"],
            b_down=values["b_down"],
            b_up=values["b_up"],
            bank_index=index,
            activation="relu",
            pre_norm=Norm(values["norm_weight"], values["norm_bias"], self.eps),
            gate=gate,
        )
        return cast(Tensor, y)

    def extra_repr(self) -> str:
        return f"{self.b_up.shape[1]}, bottlenecks={list(self.bottlenecks)}, eps={self.eps}"
