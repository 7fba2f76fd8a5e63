"""Banks of experts, of which one is drawn while training and the average is used at evaluation."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..ops import LoraBranch, gated_adapter
from .gate import BRANCH_GATE
from .lora_linear import with_branches
from .original import Original, dtype_beside, linear_kind, sizes_of


class Members(nn.Module):
    """Parameters with one entry for each of several members [M, ...], of which a step trains some:
    experts that were drawn, tasks that were in its batches.
    """

    def banks(self) -> dict[str, nn.Parameter]:
        """The banks by name, [M, ...] each."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its banks are")


class Bank(Members):
    """What banks of experts share: their parameters by side, the draw, and the average.

    A bank stores nothing of a forward. Each forward in training draws from torch's generator of the
    parameters' device, as dropout does. So gradient checkpointing, which restores that generator
    before it computes a layer again, uses the experts of the first forward; restoring torch's
    random state repeats the draws; a captured CUDA graph draws at each replay; and ranks draw
    independently, unless their generators are equal.
    """

    SIDES: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())  # parameter names: down, up

    def banks(self) -> dict[str, nn.Parameter]:
        """The banks of both sides by name, [M, ...] each."""
        return {name: getattr(self, name) for names in self.SIDES for name in names}

    def draw(self) -> Tensor:
        """One expert for each side, [2] int64: of one forward, for its whole batch."""
        banks = self.banks().values()
        device = next(iter(banks)).device
        return torch.randint(max(map(len, banks)), (2,), device=device)

    def chosen(self) -> tuple[dict[str, Tensor], tuple[Tensor | None, Tensor | None]]:
        """The parameters of this forward by name, and the index [] of each side that is a bank."""
        if not self.training:
            return self.averages(), (None, None)
        banks = self.banks()
        values = {name: bank[0] if len(bank) == 1 else bank for name, bank in banks.items()}
        is_one = [len(banks[names[0]]) == 1 for names in self.SIDES]
        if all(is_one):
            return values, (None, None)
        down, up = self.draw().unbind()
        return values, (None if is_one[0] else down, None if is_one[1] else up)

    def averages(self) -> dict[str, Tensor]:
        """The mean of each bank. It is computed at each call, which costs little: a stored mean
        would be out of date after any write to the bank.
        """
        return {name: _mean(bank) for name, bank in self.banks().items()}

    @torch.no_grad()
    def merge(self) -> None:
        """Each bank becomes its mean, a bank of one."""
        for name, bank in self.banks().items():
            setattr(self, name, nn.Parameter(_mean(bank).clone()[None], bank.requires_grad))


class ExpertAdapter(Bank):
    """``y = x + W_up^(k) φ( W_down^(j) x + b_down^(j) ) + b_up^(k)`` with j and k drawn.

    Both projections of every expert start as N(0, 0.02), biases as 0.

    Args:
        hidden_size, bottleneck: D and R. sizes: how many W_down and how many W_up.
        activation, dropout: as in `GatedAdapter`.
    """

    SIDES = (("w_down", "b_down"), ("w_up", "b_up"))

    def __init__(
        self,
        hidden_size: int,
        bottleneck: int,
        sizes: tuple[int, int],
        *,
        activation: str = "gelu",
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation, self.dropout = activation, dropout

        def empty(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        self.w_down, self.b_down = (
            empty(sizes[0], bottleneck, hidden_size),
            empty(sizes[0], bottleneck),
        )
        self.w_up, self.b_up = (
            empty(sizes[1], hidden_size, bottleneck),
            empty(sizes[1], hidden_size),
        )
        for weight, bias in ((self.w_down, self.b_down), (self.w_up, self.b_up)):
            nn.init.normal_(weight, std=0.02)
            nn.init.zeros_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """y [B, S, D]."""
        values, index = self.chosen()
        return cast(
            Tensor,
            gated_adapter(
                x,
                values["w_down"],
                values["w_up"],
                b_down=values["b_down"],
                b_up=values["b_up"],
                bank_index=index,
                activation=self.activation,
                dropout_p=self.dropout if self.training else 0.0,
            ),
        )


class ExpertLoRALinear(Bank):
    """``y = x Wᵀ + b + alpha / R · (dropout(x) A^(j)ᵀ) B^(k)ᵀ`` with j and k drawn.

    W and b are the parameters of the Linear that it replaces. Each A starts as
    U(±1 / sqrt(Din)), all equal with ``identical_start``; B starts as 0.
    """

    SIDES = (("lora_a",), ("lora_b",))
    bias: nn.Parameter | None

    def __init__(
        self,
        base: nn.Linear,
        r: int,
        alpha: float,
        sizes: tuple[int, int],
        *,
        dropout: float = 0.0,
        identical_start: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.original = Original(base, linear_kind(base))
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        device, dtype = base.weight.device, dtype or dtype_beside(base)
        into, out = sizes_of(base)
        self.lora_a, self.lora_b = expert_banks(
            into, out, r, sizes, identical_start, device=device, dtype=dtype
        )

    def forward(self, x: Tensor) -> Tensor:
        """y [..., Dout]."""
        return with_branches(self, x, {BRANCH_GATE: self._branch()}, dropout=self.dropout)[0]

    def _branch(self) -> LoraBranch:
        """The branch of this forward."""
        values, index = self.chosen()
        a, b = values["lora_a"], values["lora_b"]
        return LoraBranch(a, b, scale=self.alpha / self.r, bank_index=index)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """``W + alpha / R · B A`` with the banks' means A and B, as `LoRALinear`'s."""
        self.original.check_mergeable()
        means = self.averages()
        a, b, scale = means["lora_a"], means["lora_b"], self.alpha / self.r
        return self.original.merged(self.weight, a, b, scale)


def expert_banks(
    into: int, out: int, r: int, sizes: tuple[int, int], identical_start: bool, **placement: Any
) -> tuple[nn.Parameter, nn.Parameter]:
    """The banks A [M, R, Din] and B [M_up, Dout, R] of expert branches as they start."""
    a = torch.empty(sizes[0], r, into, **placement)
    for member in a:
        nn.init.kaiming_uniform_(member, a=math.sqrt(5))
    if identical_start:
        a.copy_(a[:1].expand_as(a).clone())
    return nn.Parameter(a), nn.Parameter(torch.zeros(sizes[1], out, r, **placement))


def _mean(bank: Tensor) -> Tensor:
    """The mean of a bank's members; of one member itself, bit for bit."""
    return bank[0] if len(bank) == 1 else bank.mean(dim=0)


def spare_unselected(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[RemovableHandle]:
    """Makes each step of the optimizer skip every expert, and every task, without a gradient: its
    weights and its moments stay as they are, without decay. Remove the returned hooks to end this.

    A bank is one parameter, so an expert that was not drawn, or a task that was not in the batch,
    has a gradient of zeros; without this, Adam would shrink its moments and AdamW its weights. Bias
    correction counts the bank's steps, not each member's own.
    """
    banks = [
        bank
        for module in model.modules()
        if isinstance(module, Members)
        for bank in module.banks().values()
        if len(bank) > 1
    ]
    saved: list[tuple[Tensor, Tensor, Tensor]] = []

    def save(*_: object) -> None:
        saved.clear()
        for bank in banks:
            if bank.grad is None:
                continue
            is_unselected = (bank.grad.flatten(1) == 0).all(dim=1)
            is_unselected = is_unselected.view(-1, *[1] * (bank.ndim - 1))
            for tensor in (bank, *_moments(optimizer, bank)):
                saved.append((tensor, tensor.detach().clone(), is_unselected))

    def restore(*_: object) -> None:
        with torch.no_grad():
            for tensor, value, is_unselected in saved:
                tensor.copy_(torch.where(is_unselected, value, tensor))
        saved.clear()

    return [optimizer.register_step_pre_hook(save), optimizer.register_step_post_hook(restore)]


def _moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    """The tensors of an optimizer's state that have the shape of a parameter."""
    state = optimizer.state.get(parameter, {})
    return [
        v for v in state.values() if isinstance(v, Tensor) and v.shape == parameter.shape and v.ndim
    ]
