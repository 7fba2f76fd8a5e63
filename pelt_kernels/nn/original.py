"""The module that another one replaces: its formula may be fused, or it has to be called."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
NAMES = ("weight", "bias")
# While a module computes with another weight, every thread would see that weight: one at a time.
_weight_lock = threading.RLock()


class Original:
    """The module that a stand-in replaces. The stand-in holds its weight and bias under the same
    names, so names in the model do not change; this object is outside the tree of modules.

    A plain module computes its class's formula and nothing else, so the stand-in may fuse it with
    its own. Any other module is called, so that its hooks, its class and a forward of its own work
    as before: they get the module's own input and output, before the stand-in adds to it.
    """

    def __init__(self, module: nn.Module, kind: type[nn.Module]) -> None:
        self.module = module
        module_class = type(module)
        self._has_own_class = (
            module_class.forward is not kind.forward
            or module_class.__call__ is not nn.Module.__call__
        )

    @property
    def has_own_forward(self) -> bool:
        """Whether the module computes something other than the formula of its kind."""
        return self._has_own_class or "forward" in self.module.__dict__

    @property
    def is_plain(self) -> bool:
        """Whether nothing but the formula happens when the module is called now."""
        module = self.module
        return not (
            self._has_own_class
            or module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        )

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

    def check_mergeable(self) -> None:
        """Raises ValueError where an update of the weight is not an update of the output."""
        if self.has_own_forward:
            raise ValueError(
                "merging: expected a Linear with nn.Linear's own forward, got "
                f"{type(self.module).__name__} with another one, which may use its weight in "
                "another way; keep the method in the model"
            )


def why_not_replaceable(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> str:
    """Empty where a module with the same weight and bias may replace this one, else what it is and
    the way out, as the rest of a sentence.
    """
    described = f"{type(module).__name__} of {type(module).__module__}"
    if hasattr(module, "base_layer"):
        return (
            f"{described}, which another method put around a {kind.__name__}; merge that into the "
            "weight first (PEFT: merge_and_unload())"
        )
    if not isinstance(module, kind):
        return f"{described}; load the base model with plain modules, without quantization"
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
            return f"a {name} of {tensor.dtype}; load the base model without quantization"
        # A tensor class with its own dispatch does not support this package's operators.
        has_own_dispatch = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
        if has_own_dispatch and not isinstance(tensor, FakeTensor):
            return (
                f"a {name} of the tensor class {type(tensor).__name__}; load the base model with "
                "plain tensors, without quantization"
            )
    return ""
