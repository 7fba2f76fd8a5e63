"""PEFT's LoRA layers on `lora_linear`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import peft
import torch
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..nn.original import has_own_class, is_watched, linear_kind, why_not_replaceable
from ..ops import LoraBranch, lora_linear
from ..ops._arguments import cast_activation
from ..ops.lora_linear.contract import MAX_RANK
from .peft_versions import check_version
from .replacement import Accelerated, Replacement, library_class

OPERATOR = "lora_linear"
HALVES = (torch.float16, torch.bfloat16)


class AcceleratedLoraLinear(Accelerated, lora.Linear):
    """PEFT's LoRA beside a Linear or a Conv1D, with base and branches on one read of x.

    Which adapters, scales and dropouts a call has is read from PEFT's own state. A call of which
    the operator would compute anything else than PEFT does goes PEFT's own way.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's: y [..., Dout] in the base layer's dtype."""
        if args or kwargs or self.disable_adapters or self.merged:
            return self._own_way(x, *args, **kwargs)
        base: Any = self.base_layer
        is_transposed = isinstance(base, Conv1D)
        if not _is_plain(base, Conv1D if is_transposed else nn.Linear):
            return self._own_way(x)
        activation = cast_activation(x)
        weight, bias = base.weight, base.bias
        if not _fits(weight, activation) or (bias is not None and not _fits(bias, activation)):
            return self._own_way(x)
        downs: Any = self.lora_A
        ups: Any = self.lora_B
        dropouts: Any = self.lora_dropout
        branches: list[LoraBranch] = []
        rate = None  # of the dropout in front of all branches
        for name in self.active_adapters:
            if name not in downs:
                continue
            down, up, dropout = downs[name], ups[name], dropouts[name]
            p = _rate(dropout)
            if (
                name in self.lora_variant
                or not (_is_plain(down, nn.Linear) and _is_plain(up, nn.Linear))
                or not (_fits(down.weight, activation) and _fits(up.weight, activation))
                or down.weight.shape[0] > MAX_RANK
                or p is None
                or rate not in (None, p)
            ):
                return self._own_way(x)
            rate, scale = p, self.scaling[name]
            branches.append(LoraBranch(down.weight, up.weight, 0, scale))
            if up.bias is not None:
                bias = up.bias * scale if bias is None else bias + up.bias * scale
        if not branches:
            return self._own_way(x)
        y: Tensor = lora_linear(
            activation,
            weight,
            bias,
            branches,
            transposed=is_transposed,
            dropout_p=rate or 0.0,
            backend=self.pelt_backend,
        )
        return y

    def _own_way(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = lora.Linear.forward(self, x, *args, **kwargs)
        return y


def replacements(model: nn.Module, backend: str | None) -> list[Replacement]:
    """What each of PEFT's layers in a model becomes.

    Raises:
        ValueError: a version of PEFT that this was not compared with, an adapter that is merged, a
            layer on the meta device or one that the backend cannot serve.
    """
    layers: list[tuple[str, Any]] = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]
    if not layers:
        return []
    check_version(peft.__version__)
    found = []
    for name, module in layers:
        reason = _why_left_alone(module)
        if reason:
            found.append(Replacement(name, module, None, reason=reason))
            continue
        _check_is_usable(name, module)
        found.append(Replacement(name, module, AcceleratedLoraLinear, OPERATOR, _exception(module)))
    if backend is not None:
        _check_backend((each.module for each in found if each.accelerated), backend)
    return found


def _why_left_alone(module: Any) -> str:
    """Why a layer stays as PEFT made it; empty for one that is served."""
    kind = library_class(module)
    if not isinstance(module, lora.LoraLayer):
        return f"{kind.__name__} of {kind.__module__} is not a layer of LoRA"
    if kind is not lora.Linear:
        return f"{kind.__name__} of {kind.__module__} is not PEFT's LoRA beside a plain Linear"
    base = module.base_layer
    reason = why_not_replaceable(base, linear_kind(base))
    if reason:
        return f"expected a plain base layer, got {reason}"
    if has_own_class(base, linear_kind(base)):
        return f"its base layer, {type(base).__name__}, has a forward of its own"
    if "forward" in module.__dict__:
        return "its forward was replaced, as by hooks that load its weights at each call"
    names = list(module.lora_A)
    variants = {type(module.lora_variant[name]).__name__ for name in module.lora_variant}
    if names and all(name in module.lora_variant for name in names):
        return f"its adapters are variants of LoRA ({', '.join(sorted(variants))})"
    if names and all(module.r[name] > MAX_RANK for name in names):
        return f"its ranks are above {MAX_RANK}"
    return ""


def _exception(module: Any) -> str:
    """Which calls of a layer that is served go PEFT's own way now."""
    if is_watched(module.base_layer):
        return "its base layer has hooks, so it is called as PEFT does"
    others = [name for name in module.lora_A if name in module.lora_variant]
    others += [name for name, rank in module.r.items() if rank > MAX_RANK]
    return f"with {', '.join(others)} it goes PEFT's own way" if others else ""


def _check_is_usable(name: str, module: Any) -> None:
    if module.merged:
        raise ValueError(
            f"accelerate: expected no merged adapter, got {', '.join(module.merged_adapters)} in "
            f"{name}; call unmerge_adapter() first, or merge_and_unload() to keep the weights"
        )
    if module.base_layer.weight.device.type == "meta":
        raise ValueError(
            f"accelerate: expected weights in memory, got {name} on the meta device; load them "
            "first"
        )


def _check_backend(modules: Iterable[Any], backend: str) -> None:
    """Raises BackendError where the backend cannot serve a layer, by one call for each shape."""
    seen = set()
    for module in modules:
        weight, is_transposed = module.base_layer.weight, isinstance(module.base_layer, Conv1D)
        ranks = tuple(module.r[name] for name in module.active_adapters if name in module.r)
        key = (weight.shape, weight.dtype, weight.device, is_transposed, ranks)
        if key in seen or not ranks:
            continue
        seen.add(key)
        x = weight.new_zeros(1, 1, module.in_features).requires_grad_()
        branches = [
            LoraBranch(module.lora_A[name].weight, module.lora_B[name].weight)
            for name in module.active_adapters
            if name in module.r
        ]
        with torch.enable_grad():
            lora_linear(x, weight, None, branches, transposed=is_transposed, backend=backend)


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    return not (has_own_class(module, kind) or is_watched(module))


def _fits(parameter: Tensor, activation: Tensor) -> bool:
    """Whether the operator takes a parameter beside an activation."""
    is_own = parameter.__class__ is nn.Parameter or parameter.__class__ is Tensor
    if not is_own or parameter.dtype is activation.dtype:
        return is_own
    return parameter.dtype is torch.float32 and activation.dtype in HALVES


def _rate(dropout: nn.Module) -> float | None:
    """The rate of a dropout in this call; None where it is something else, or drops everything."""
    if isinstance(dropout, nn.Identity):
        return 0.0
    if type(dropout) is not nn.Dropout or is_watched(dropout) or dropout.p >= 1.0:
        return None
    return dropout.p if dropout.training else 0.0
