"""PEFT's LoRA layers on `lora_linear`, and the attention of the model around them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import peft
import torch
from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ..nn.original import has_own_class, is_plain, is_watched, linear_kind, why_not_replaceable
from ..nn.quantised import is_quantised
from ..ops import LoraBranch, lora_linear
from ..ops._arguments import cast_activation
from ..ops.lora_linear.contract import MAX_RANK
from .calls import fits, is_cheaper_composed, is_dense
from .peft_attention import replacement
from .peft_branches import Branch, added, branches_of
from .peft_quantised import BESIDE, KINDS
from .replacement import Accelerated, Replacement, check_in_memory, library_class
from .versions import check_version

OPERATOR = "lora_linear"
# Elements of y from which the operator takes less time than PyTorch's operations. Those drop in
# passes of their own, and without dropout a CPU's products of 512 rows are as fast as the kernels
# and start sooner; a wider branch takes more of them (at T = 2048 and D = 768 the kernels take 0.89
# of the time at rank 8, and 1.04 at rank 64; float32, AVX-512).
PAYS_FROM = 1 << 16
PAYS_FROM_ON_CPU = 1 << 20  # and twice as many at rank 32, and so on


class AcceleratedLoraLinear(Accelerated, lora.Linear):
    """PEFT's LoRA beside a Linear or a Conv1D, with base and branches on one read of x.

    Which adapters, scales and dropouts a call has is read from PEFT's own state. A call of which
    the operator would compute anything else than PEFT does goes PEFT's own way.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's: y [..., Dout] in the base layer's dtype."""
        y = None
        base: Any = self._modules["base_layer"]
        is_transposed = isinstance(base, Conv1D)
        if (
            not args
            and not self._disable_adapters
            and not self.merged_adapters
            and is_dense(x)
            and is_plain(base, Conv1D if is_transposed else nn.Linear)
        ):
            weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
            if not kwargs:
                y = self._active(x, weight, bias, is_transposed)
            elif kwargs.keys() == {"adapter_names"} and kwargs["adapter_names"] is not None:
                self._check_forward_args(x, **kwargs)
                y = self._mixed(x, weight, bias, is_transposed, **kwargs)
        if y is None:
            y = super().forward(x, *args, **kwargs)
        return y

    def _active(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, is_transposed: bool
    ) -> Tensor | None:
        """y with the active adapters; None where that is PEFT's to compute."""
        branches = branches_of(self, self.active_adapters)
        if not branches or weight is None:
            return None
        p = max(branch.p for branch in branches)
        # PEFT drops for each adapter by itself, and the operator once for all branches.
        if (p and len(branches) > 1) or self._is_cheaper_composed(x, branches):
            return _composed(x, weight.T if is_transposed else weight, bias, branches)
        activation = cast_activation(x)
        if not _are_served(activation, weight, bias, branches):
            return None
        for branch in branches:
            if branch.bias is not None:
                own = branch.bias * branch.scale
                bias = own if bias is None else bias + own
        y: Tensor = lora_linear(
            activation,
            weight,
            bias,
            [LoraBranch(branch.a, branch.b, 0, branch.scale) for branch in branches],
            transposed=is_transposed,
            dropout_p=p,
            backend=self.pelt_backend,
        )
        return y

    def _mixed(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        is_transposed: bool,
        adapter_names: list[str],
    ) -> Tensor | None:
        """y where each sample names its adapter, or none of this layer's: one bank of all that are
        named, with a member of zeros for the others. None where that is PEFT's to compute.
        """
        modules: Any = self._modules
        used = [name for name in dict.fromkeys(adapter_names) if name in modules["lora_A"]]
        branches = branches_of(self, used)
        if not branches or weight is None or self._is_cheaper_composed(x, ()):
            return None
        activation = cast_activation(x)
        if not _are_served(activation, weight, bias, branches):
            return None
        if any(branch.p or branch.bias is not None for branch in branches):
            return None
        rank = max(len(branch.a) for branch in branches)
        downs = [functional.pad(b.a, (0, 0, 0, rank - len(b.a))) for b in branches]
        ups = [functional.pad(b.b * b.scale, (0, rank - len(b.a))) for b in branches]
        if any(name not in used for name in adapter_names):
            downs.append(torch.zeros_like(downs[0]))
            ups.append(torch.zeros_like(ups[0]))
        member = {name: i for i, name in enumerate(used)}
        index = torch.tensor([member.get(n, len(used)) for n in adapter_names], device=x.device)
        y: Tensor = lora_linear(
            activation[:, None] if x.ndim == 2 else activation,
            weight,
            bias,
            [LoraBranch(torch.stack(downs), torch.stack(ups), bank_index=index)],
            transposed=is_transposed,
            backend=self.pelt_backend,
        )
        return y[:, 0] if x.ndim == 2 else y

    def _is_cheaper_composed(self, x: Tensor, branches: Sequence[Branch]) -> bool:
        """Of branches that samples share; PEFT's own way takes a pass for each of the others."""
        sizes: Any = self  # PEFT knows layers without them, which are no Linear
        elements = x.shape[:-1].numel() * sizes.out_features
        pays_from = PAYS_FROM
        if pays_from and branches and x.is_cpu and not any(branch.p for branch in branches):
            ranks = sum(len(branch.a) for branch in branches)
            pays_from = PAYS_FROM_ON_CPU * max(16, ranks) // 16
        return is_cheaper_composed(elements, pays_from, self.pelt_backend)


def _composed(x: Tensor, weight: Tensor, bias: Tensor | None, branches: list[Branch]) -> Tensor:
    """PEFT's formula in PyTorch's operations, without a call of a module."""
    rows = x.reshape(-1, x.shape[-1])
    y = functional.linear(rows, weight, bias)
    # torch.func refuses to write what a transform knows into what it does not, and a compiled graph
    # chooses by itself where to write.
    in_place = not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
    y = added(y, rows, branches, in_place=in_place)
    return y.view(*x.shape[:-1], y.shape[-1])


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
    check_version("peft", peft.__version__)
    found = []
    for name, module in layers:
        reason = _why_left_alone(module)
        if reason:
            found.append(Replacement(name, module, None, reason=reason))
            continue
        _check_is_usable(name, module)
        if is_quantised(module.base_layer):
            kind = KINDS[library_class(module)]
            found.append(Replacement(name, module, kind, BESIDE, _exception(module)))
            continue
        found.append(Replacement(name, module, AcceleratedLoraLinear, OPERATOR, _exception(module)))
    for name, module in model.named_modules():
        if library_class(module) is peft.LoraModel:
            found.append(replacement(name, module, backend))
    if backend is not None:
        _check_backend((each.module for each in found if each.operator == OPERATOR), backend)
    return found


def _why_left_alone(module: Any) -> str:
    """Why a layer stays as PEFT made it; empty for one that is served."""
    kind = library_class(module)
    if not isinstance(module, lora.LoraLayer):
        return f"{kind.__name__} of {kind.__module__} is no layer of LoRA"
    if kind not in KINDS:
        return f"{kind.__name__} of {kind.__module__} is not PEFT's LoRA beside a plain Linear"
    base = module.base_layer
    if _is_sharded(base._parameters.get("weight")):
        return "its weight is a DTensor; call accelerate before the model is sharded"
    reason = why_not_replaceable(base, linear_kind(base))
    if reason:
        return f"expected a plain base layer, got {reason}"
    if has_own_class(base, linear_kind(base)) and not is_quantised(base):
        return f"its base layer, {type(base).__name__}, has a forward of its own"
    if "forward" in module.__dict__:
        return "its forward was replaced, as by hooks that load its weights at each call"
    names = list(module.lora_A)
    variants = {type(module.lora_variant[name]).__name__ for name in module.lora_variant}
    if names and all(name in module.lora_variant for name in names):
        return f"its adapters are variants of LoRA ({', '.join(sorted(variants))})"
    if names and all(module.r[name] > MAX_RANK for name in names) and not is_quantised(base):
        return f"its ranks are above {MAX_RANK}"
    return ""


def _is_sharded(weight: Tensor | None) -> bool:
    # Whoever has a DTensor has loaded the module that defines it.
    defining = sys.modules.get("torch.distributed.tensor")
    return defining is not None and isinstance(weight, defining.DTensor)


def _exception(module: Any) -> str:
    """Which calls of a layer that is served go PEFT's own way now."""
    others = [name for name in module.lora_A if name in module.lora_variant]
    if not is_quantised(module.base_layer):  # which is called, at any rank
        if is_watched(module.base_layer):
            return "its base layer has hooks, so PEFT calls it"
        others += [name for name, rank in module.r.items() if rank > MAX_RANK]
    return f"calls with {', '.join(others)} go PEFT's own way" if others else ""


def _check_is_usable(name: str, module: Any) -> None:
    if module.merged:
        raise ValueError(
            f"accelerate: expected no merged adapter, got {', '.join(module.merged_adapters)} in "
            f"{name}; call unmerge_adapter() first, or merge_and_unload() to keep the weights"
        )
    check_in_memory(name, module)


def _check_backend(modules: Iterable[Any], backend: str) -> None:
    """Raises BackendError where the backend cannot serve a layer, by one call for each shape."""
    seen = set()
    for module in modules:
        weight, is_transposed = module.base_layer.weight, isinstance(module.base_layer, Conv1D)
        x = weight.new_zeros(1, 1, module.in_features).requires_grad_()
        pairs = [
            (module.lora_A[name].weight, module.lora_B[name].weight)
            for name in module.active_adapters
            if name in module.lora_A and name not in module.lora_variant
        ]
        branches = [LoraBranch(a, b) for a, b in pairs if len(a) <= MAX_RANK and fits(x, a, b)]
        ranks = tuple(len(branch.a) for branch in branches)
        key = (weight.shape, weight.dtype, weight.device, is_transposed, ranks)
        if branches and key not in seen:
            seen.add(key)
            with torch.enable_grad():
                lora_linear(x, weight, None, branches, transposed=is_transposed, backend=backend)


def _are_served(
    activation: Tensor, weight: Tensor, bias: Tensor | None, branches: list[Branch]
) -> bool:
    """Whether the operator takes a layer's own parameters and those of its branches."""
    return fits(activation, weight, bias) and all(
        fits(activation, branch.a, branch.b, branch.bias) and branch.a.shape[0] <= MAX_RANK
        for branch in branches
    )
