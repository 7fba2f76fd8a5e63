"""The module that another one replaces: its formula may be fused, or it has to be called."""

from __future__ import annotations

import sys
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from .quantised import is_quantised

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NAMES = ("weight", "bias")
WAY_OUT = "without quantization, or with bitsandbytes' (Linear4bit, Linear8bitLt) or torchao's"
# While a module computes with another weight, every thread would see that weight: one at a time.
_weight_lock = threading.RLock()


def linear_kind(module: nn.Module) -> type[nn.Module]:
    """nn.Linear, or the class of a Conv1D: transformers' Linear that holds its weight as [Din,
    Dout]. Whoever has a Conv1D has loaded the module that defines it.
    """
    defining = sys.modules.get("transformers.pytorch_utils")
    conv1d = getattr(defining, "Conv1D", None)
    return conv1d if conv1d is not None and isinstance(module, conv1d) else nn.Linear


def is_transposed(module: nn.Module) -> bool:
    """Whether a Linear holds its weight as [Din, Dout]."""
    return linear_kind(module) is not nn.Linear


def sizes_of(module: nn.Module) -> tuple[int, int]:
    """Din and Dout of a Linear."""
    if is_quantised(module):
        linear: Any = module
        return linear.in_features, linear.out_features
    weight = module.weight
    assert isinstance(weight, Tensor)
    into, out = weight.shape if is_transposed(module) else weight.shape[::-1]
    return into, out


def dtype_beside(module: nn.Module) -> torch.dtype:
    """The dtype of new parameters beside a Linear: its weight's; float32 beside a quantised one."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return torch.float32 if is_quantised(module) else weight.dtype


def product(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool = False) -> Tensor:
    """``x Wᵀ + b``, of a weight [Dout, Din], or transposed [Din, Dout]."""
    return nn.functional.linear(x, weight.T if transposed else weight, bias)


def merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``W + scale · B A`` in W's dtype, computed in float64 and rounded once.

    Raises:
        ValueError: a 16-bit W, whose steps are too coarse for a learned update.
    """
    if weight.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"merging: expected a weight in float32 or float64, got {weight.dtype}, which would "
            "round the update; load the base model in float32"
        )
    update = b.double() @ a.double()
    return torch.add(weight.double(), update, alpha=scale).to(weight.dtype)


def has_own_class(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module's class computes something other than the formula of its kind."""
    module_class = type(module)
    return (
        module_class.forward is not kind.forward or module_class.__call__ is not nn.Module.__call__
    )


def is_watched(module: nn.Module) -> bool:
    """Whether a call of a module does more than its class's forward, or something else: it has
    hooks, or a forward of its own.
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether nothing but its kind's formula happens when a module is called now."""
    return not (has_own_class(module, kind) or is_watched(module))


class Original:
    """The module that a stand-in replaces. The stand-in holds its weight and bias under the same
    names, so names in the model do not change; this object is outside the tree of modules.

    A plain module computes its class's formula and nothing else, so the stand-in may fuse it with
    its own. Any other module is called, so that its hooks, its class and a forward of its own work
    as before: they get the module's own input and output, before the stand-in adds to it.
    """

    def __init__(self, module: nn.Module, kind: type[nn.Module]) -> None:
        self.module = module
        self.is_transposed = is_transposed(module)
        self.is_quantised = is_quantised(module)
        self._has_own_class = self.is_quantised or has_own_class(module, kind)

    @property
    def has_own_forward(self) -> bool:
        """Whether the module computes something other than the formula of its kind."""
        return self._has_own_class or "forward" in self.module.__dict__

    @property
    def is_plain(self) -> bool:
        """Whether nothing but the formula happens when the module is called now."""
        return not (self._has_own_class or is_watched(self.module))

    def __call__(self, stand_in: nn.Module, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """The module's own output, hooks included, with the parameters that its stand-in has now
        (moving or loading a model may replace them), or with another weight for this call.
        """
        module = self._in_step_with(stand_in)
        if weight is None:
            y: Tensor = module(x)
            return y
        is_compiling = torch.compiler.is_compiling()
        lock: AbstractContextManager[object] = nullcontext() if is_compiling else _weight_lock
        with lock:
            module._parameters["weight"] = weight  # type: ignore[assignment]
            try:
                result: Tensor = module(x)
            finally:
                module._parameters["weight"] = getattr(stand_in, "weight")  # noqa: B009
        return result

    def without_hooks(self, stand_in: nn.Module, x: Tensor) -> Tensor:
        """The module's own forward and nothing else."""
        y: Tensor = self._in_step_with(stand_in).forward(x)
        return y

    def _in_step_with(self, stand_in: nn.Module) -> nn.Module:
        """The module with the parameters and the training mode that its stand-in has now."""
        module = self.module
        module.training = stand_in.training
        for name in NAMES:
            module._parameters[name] = getattr(stand_in, name)
        return module

    def laid_out(self, weight: Tensor) -> Tensor:
        """A weight of the module as [Dout, Din], or one [Dout, Din] as the module holds it."""
        return weight.T if self.is_transposed else weight

    def merged(self, weight: Tensor, a: Tensor, b: Tensor, scale: float, offset: int = 0) -> Tensor:
        """``W + scale · B A`` in W's layout, into the output columns from `offset` on."""
        rows = weight.T if self.is_transposed else weight
        rows = rows.clone()
        rows[offset : offset + len(b)] = merged(rows[offset : offset + len(b)], a, b, scale)
        return rows.T.contiguous() if self.is_transposed else rows

    def check_mergeable(self) -> None:
        """Raises ValueError where an update of the weight is not an update of the output."""
        if self.is_quantised:
            raise ValueError(
                "merging: expected a floating-point weight, got the quantised one of "
                f"{type(self.module).__name__}, whose steps would round the update; keep the "
                "method in the model, or load its adapter into the base model in float32"
            )
        if self.has_own_forward:
            raise ValueError(
                "merging: expected a Linear with nn.Linear's own forward, got "
                f"{type(self.module).__name__} with another one, which may use its weight in "
                "another way; keep the method in the model"
            )


def stands_for_quantised(module: nn.Module) -> bool:
    """Whether a module stands for a quantised Linear."""
    original = getattr(module, "original", None)
    return isinstance(original, Original) and original.is_quantised


def why_not_replaceable(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> str:
    """Empty where a module with the same weight and bias may replace this one, else what it is and
    the way out, as the rest of a sentence.
    """
    if kind is nn.Linear and is_quantised(module):
        return ""
    described = f"{type(module).__name__} of {type(module).__module__}"
    if hasattr(module, "base_layer"):
        return (
            f"{described}, which another method put around a {kind.__name__}; merge that into the "
            "weight first (PEFT: merge_and_unload())"
        )
    if not isinstance(module, kind):
        return f"{described}; load the base model with plain modules, {WAY_OUT}"
    tensors = [name for name, _ in module.named_parameters()]
    tensors += [name for name, _ in module.named_buffers()]
    is_unknown = set(tensors) - set(NAMES) or any(True for _ in module.children())
    if is_unknown or not set(NAMES) <= module._parameters.keys():
        return (
            f"{described} made of {', '.join(tensors) or 'none'}; take a parametrization or a "
            "pruning off first (torch.nn.utils.parametrize.remove_parametrizations, "
            "torch.nn.utils.remove_weight_norm, torch.nn.utils.prune.remove)"
        )
    for name in NAMES:
        tensor = module._parameters[name]
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            return (
                f"a {name} of {tensor.dtype}; load the base model with floating-point weights, "
                f"{WAY_OUT}"
            )
        # A tensor class with its own dispatch does not support this package's operators.
        has_own_dispatch = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
        if has_own_dispatch and not isinstance(tensor, FakeTensor):
            return (
                f"a {name} of the tensor class {type(tensor).__name__}; load the base model with "
                f"plain tensors, {WAY_OUT}"
            )
    return ""
