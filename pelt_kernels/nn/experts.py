"""Banks of experts, of which one is drawn while training and the average is used at evaluation."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from ..ops import LoraBranch, gated_adapter, lora_linear
from ._computed import Computed
from .lora_linear import merged

PASSES = 2  # of one training step: AdaMix's consistency loss compares two


class Router(nn.Module):
    """Draws one expert for each side of each of its modules and for each pass over a batch.

    The draws are a function of a seed, a step and how many were made since `seek`: the same on
    every rank, and again the same after a resumption. They lie in the buffer ``draws`` [PASSES,
    modules, 2] on the device, so a captured CUDA graph reads what `draw` last wrote there; nothing
    is read back.
    """

    draws: Tensor

    def __init__(self, experts: int, seed: int = 0, device: torch.device | None = None) -> None:
        super().__init__()
        self.experts, self.seed, self.step, self.drawn = experts, seed, 0, 0
        self.modules_served = 0
        self.index: Tensor | None = None
        empty = torch.zeros(PASSES, 0, 2, dtype=torch.int64, device=device)
        self.register_buffer("draws", empty, persistent=False)

    def add(self) -> int:
        """A number for one more module."""
        self.modules_served += 1
        self.draws = self.draws.new_zeros(PASSES, self.modules_served, 2)
        return self.modules_served - 1

    def seek(self, step: int, seed: int | None = None) -> None:
        """The draws from here on are those of a training step."""
        self.step, self.drawn = step, 0
        self.seed = self.seed if seed is None else seed

    def draw(self, passes: int = 1, batch: int = 1) -> None:
        """Draws for one pass over a batch, or for two at once: the first ``batch`` sentences are
        the first pass, the others the second.
        """
        is_captured = self.draws.is_cuda and torch.cuda.is_current_stream_capturing()
        if not is_captured:
            # Sums of odd multiples: neighbouring steps and seeds get unrelated generators.
            mixed = self.seed * 0x9E3779B97F4A7C15 + self.step * 0xC2B2AE3D27D4EB4F + self.drawn
            generator = torch.Generator().manual_seed(mixed % 2**63)
            shape = (PASSES, self.modules_served, 2)
            self.draws.copy_(torch.randint(0, self.experts, shape, generator=generator))
            self.drawn += 1
        # A copy, because the next draw overwrites the buffer and backward may come after it.
        if passes == 1:
            self.index = self.draws[0].clone()
        else:
            self.index = self.draws[:passes].permute(1, 2, 0).repeat_interleave(batch, dim=2)

    def of(self, number: int, side: int) -> Tensor:
        """The index of one module's side: [] or [B]."""
        if self.index is None:
            self.draw()
        assert self.index is not None
        return self.index[number, side]


class Bank(nn.Module):
    """What banks of experts share: their parameters by side, the draw, and the cached average."""

    SIDES: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())  # parameter names: down, up

    def __init__(self, router: Router) -> None:
        super().__init__()
        # The router is one for all modules and belongs to the model.
        object.__setattr__(self, "router", router)
        self.number = router.add()
        self._averages: Computed[dict[str, Tensor | None]] = Computed()

    def _bank(self, name: str) -> nn.Parameter | None:
        return cast("nn.Parameter | None", getattr(self, name))

    def chosen(self) -> tuple[dict[str, Tensor | None], tuple[Tensor | None, Tensor | None]]:
        """The parameters of this pass by name, and the index of each side that is a bank."""
        if not self.training:
            return self.averages(), (None, None)
        router = cast(Router, self.router)
        values: dict[str, Tensor | None] = {}
        index: list[Tensor | None] = []
        for side, names in enumerate(self.SIDES):
            banks = {name: self._bank(name) for name in names}
            sizes = {len(bank) for bank in banks.values() if bank is not None}
            is_single = sizes == {1}
            for name, bank in banks.items():
                values[name] = bank[0] if is_single and bank is not None else bank
            index.append(None if is_single else router.of(self.number, side))
        return values, (index[0], index[1])

    def averages(self) -> dict[str, Tensor | None]:
        """The mean of each bank: with gradients where they are wanted, else `Computed` once (a
        compiled graph makes them itself).
        """
        banks = {name: self._bank(name) for names in self.SIDES for name in names}

        def means() -> dict[str, Tensor | None]:
            return {name: None if b is None else _mean(b) for name, b in banks.items()}

        given = [bank for bank in banks.values() if bank is not None]
        wants_gradient = torch.is_grad_enabled() and any(bank.requires_grad for bank in given)
        if wants_gradient or torch.compiler.is_compiling():
            return means()
        return self._averages(given, means)

    def merge(self) -> None:
        """Each bank becomes its mean, a bank of one."""
        for name, value in self.averages().items():
            bank = self._bank(name)
            if bank is not None and value is not None:
                merged = nn.Parameter(value.detach().clone()[None], bank.requires_grad)
                setattr(self, name, merged)
        self._averages.forget()


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
        router: Router,
        *,
        activation: str = "gelu",
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(router)
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
        w_down, w_up = values["w_down"], values["w_up"]
        assert w_down is not None and w_up is not None
        return cast(
            Tensor,
            gated_adapter(
                x,
                w_down,
                w_up,
                b_down=values["b_down"],
                b_up=values["b_up"],
                bank_index=index,
                activation=self.activation,
                dropout_p=self.dropout if self.training else 0.0,
            ),
        )


class ExpertLoRALinear(Bank):
    """``y = x Wᵀ + b + alpha / R · (dropout(x) A^(j)ᵀ) B^(k)ᵀ`` with j and k drawn.

    W and b are the very parameters of the `nn.Linear` it stands for. Each A starts as U(±1 /
    sqrt(Din)), all equal with ``identical_start``; B starts as 0.
    """

    SIDES = (("lora_a",), ("lora_b",))
    bias: nn.Parameter | None

    def __init__(
        self,
        base: nn.Linear,
        r: int,
        alpha: float,
        sizes: tuple[int, int],
        router: Router,
        *,
        dropout: float = 0.0,
        identical_start: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(router)
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        device, dtype = base.weight.device, dtype or base.weight.dtype
        a = torch.empty(sizes[0], r, base.in_features, device=device, dtype=dtype)
        for member in a:
            nn.init.kaiming_uniform_(member, a=math.sqrt(5))
        if identical_start:
            a.copy_(a[:1].expand_as(a).clone())
        self.lora_a = nn.Parameter(a)
        b = torch.zeros(sizes[1], base.out_features, r, device=device, dtype=dtype)
        self.lora_b = nn.Parameter(b)

    def forward(self, x: Tensor) -> Tensor:
        """y [..., Dout]."""
        values, index = self.chosen()
        a, b = values["lora_a"], values["lora_b"]
        assert a is not None and b is not None
        branch = LoraBranch(a, b, scale=self.alpha / self.r, bank_index=index)
        dropout = self.dropout if self.training else 0.0
        return cast(Tensor, lora_linear(x, self.weight, self.bias, [branch], dropout_p=dropout))

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """``W + alpha / R · B A`` [Dout, Din] with the banks' means A and B, as `LoRALinear`'s."""
        means = self.averages()
        a, b = means["lora_a"], means["lora_b"]
        assert a is not None and b is not None
        return merged(self.weight, a, b, self.alpha / self.r)


def _mean(bank: Tensor) -> Tensor:
    """The mean of a bank's members; of one member itself, bit for bit."""
    return bank[0] if len(bank) == 1 else bank.mean(dim=0)


def spare_unselected(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """From now on a step of the optimizer leaves alone every expert without a gradient: its
    weights, its decay and its moments.

    A bank is one parameter, so an expert that was not drawn has a gradient of zeros, by which Adam
    would let its moments fade and AdamW would shrink its weights. Bias correction counts the
    bank's steps, not each expert's own.
    """
    banks = [
        bank
        for module in model.modules()
        if isinstance(module, Bank)
        for names in module.SIDES
        for bank in (module._bank(name) for name in names)
        if bank is not None and len(bank) > 1
    ]
    before: list[tuple[Tensor, Tensor, Tensor]] = []

    def keep(*_: object) -> None:
        before.clear()
        for bank in banks:
            if bank.grad is None:
                continue
            is_unselected = (bank.grad.flatten(1) == 0).all(dim=1)
            is_unselected = is_unselected.view(-1, *[1] * (bank.ndim - 1))
            for tensor in (bank, *_moments(optimizer, bank)):
                before.append((tensor, tensor.detach().clone(), is_unselected))

    def restore(*_: object) -> None:
        with torch.no_grad():
            for tensor, value, is_unselected in before:
                tensor.copy_(torch.where(is_unselected, value, tensor))
        before.clear()

    optimizer.register_step_pre_hook(keep)
    optimizer.register_step_post_hook(restore)


def _moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    """What an optimizer keeps for a parameter in its shape."""
    state = optimizer.state.get(parameter, {})
    return [
        v for v in state.values() if isinstance(v, Tensor) and v.shape == parameter.shape and v.ndim
    ]
