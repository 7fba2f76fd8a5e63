"""Which layers of the library ``adapters`` (AdapterHub) run on which operator.

LoRA in a Linear runs on `lora_linear`, bottlenecks on `gated_adapter`, gates included; prefixes in
BERT, RoBERTa and XLM-R on `prefix_attention`, and on a CPU their attention without a prefix, too.
Other layers that hold no adapter are not looked at: one that is added later is served after another
call.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import adapters
import torch
from adapters.methods.adapter_layer_base import AdapterLayerBase
from adapters.methods.bottleneck import BottleneckLayer
from adapters.methods.lora import LoRALayer, LoRALinearTorch
from adapters.methods.modeling import GLOWCouplingBlock, NICECouplingBlock
from adapters.methods.prefix_tuning import PrefixTuningLayer
from torch import nn

from ..ops import LoraBranch, Prefix, gated_adapter, lora_linear, prefix_attention
from ..ops.prefix_attention.without_prefix import is_for_cpu
from .adapters_attention import ATTENTIONS, POOLS
from .adapters_layers import BOTTLENECKS, AcceleratedLoraLinear, why_not_adapter, why_not_lora
from .replacement import Replacement, check_in_memory, library_class
from .versions import check_version

SMALL = "in small calls, and with composed adapters, it goes the library's own way"


def replacements(model: nn.Module, backend: str | None) -> list[Replacement]:
    """What each layer of the library's in a model becomes.

    Raises:
        ValueError: a version of the library that this was not compared with, an adapter that is
            merged, weights on the meta device, or a layer that the backend cannot serve.
    """
    found = list(_found(model))
    if not found:
        return []
    if is_for_cpu(backend):
        found += _plain_attentions(model)
    if not any(each.accelerated in ATTENTIONS.values() for each in found):
        found = [each for each in found if each.accelerated not in POOLS.values()]
    check_version("adapters", adapters.__version__)
    for each in found:
        check_in_memory(each.name, each.module)
    if backend is not None:
        _check_backend(found, backend)
    return found


def _found(model: nn.Module) -> Iterator[Replacement]:
    for name, module in model.named_modules():
        kind = library_class(module)
        prefixes = getattr(module, "prefix_tuning", None)
        if isinstance(prefixes, PrefixTuningLayer) and prefixes.prefixes:
            yield _attention(name, module, kind)
        if kind in POOLS:
            yield Replacement(name, module, POOLS[kind], "prefix_attention")
        elif isinstance(module, LoRALayer) and len(module.loras):
            yield _lora(name, module, kind)
        elif isinstance(module, BottleneckLayer) and len(module.adapters):
            yield _bottleneck(name, module, kind)
        elif _is_another_layer(module):
            yield _left(name, module, f"no operator computes what {kind.__name__} does")


def _is_another_layer(module: Any) -> bool:
    """Whether a module holds adapters of the library's in a way that is none of those above."""
    if isinstance(module, NICECouplingBlock | GLOWCouplingBlock):
        return True  # an invertible adapter
    is_known = isinstance(module, LoRALayer | BottleneckLayer | PrefixTuningLayer)
    is_layer = isinstance(module, AdapterLayerBase) and not is_known
    return is_layer and len(module.adapter_modules) > 0


def _attention(name: str, module: Any, kind: type[nn.Module]) -> Replacement:
    if kind not in ATTENTIONS:
        served = "those of BERT, RoBERTa and XLM-R with SDPA attention are served"
        return _left(name, module, f"its prefixes are in a {kind.__name__}; {served}")
    gates = module.prefix_tuning.prefix_gates
    several = [each for each in gates if gates[each].out_features != 1]
    reason = f"with {', '.join(several)}, whose keys and values have a gate each" if several else ""
    return Replacement(name, module, ATTENTIONS[kind], "prefix_attention", reason)


def _plain_attentions(model: nn.Module) -> Iterator[Replacement]:
    """The attentions without a prefix on a CPU."""
    for name, module in model.named_modules():
        kind = library_class(module)
        if kind not in ATTENTIONS or module.prefix_tuning.prefixes:
            continue
        if module.query.weight.device.type == "cpu":
            yield Replacement(name, module, ATTENTIONS[kind], "prefix_attention", SMALL)


def _lora(name: str, module: Any, kind: type[nn.Module]) -> Replacement:
    if module.merged:
        raise ValueError(
            f"accelerate: expected no merged adapter, got {module.merged} in {name}; call "
            "reset_adapter() first"
        )
    if kind is not LoRALinearTorch:
        return _left(name, module, f"{kind.__name__} is not the library's LoRA in a plain Linear")
    reasons = {each: why_not_lora(module.loras[each]) for each in module.loras}
    return _served(name, module, AcceleratedLoraLinear, "lora_linear", reasons)


def _bottleneck(name: str, module: Any, kind: type[nn.Module]) -> Replacement:
    if kind not in BOTTLENECKS:
        return _left(name, module, f"{kind.__name__} is not a layer with bottlenecks that is known")
    reasons = {each: why_not_adapter(module.adapters[each]) for each in module.adapters}
    found = _served(name, module, BOTTLENECKS[kind], "gated_adapter", reasons)
    if found.accelerated is None or not len(module.adapter_fusion_layer):
        return found
    fusion = "a fusion of adapters goes the library's own way"
    reason = f"{found.reason}; {fusion}" if found.reason else fusion
    return Replacement(name, module, found.accelerated, found.operator, reason)


def _served(
    name: str, module: nn.Module, kind: type[nn.Module], operator: str, reasons: dict[str, str]
) -> Replacement:
    """A layer for all its adapters but those that have a reason."""
    named = [f"{adapter} ({reason})" for adapter, reason in reasons.items() if reason]
    if len(named) == len(reasons):
        return _left(name, module, next(iter(reasons.values())))
    reason = f"with {', '.join(named)} it goes the library's own way" if named else ""
    return Replacement(name, module, kind, operator, reason)


def _left(name: str, module: nn.Module, reason: str) -> Replacement:
    return Replacement(name, module, None, reason=reason)


def _check_backend(found: list[Replacement], backend: str) -> None:
    """Raises BackendError where the backend cannot serve a layer, by one call for each shape."""
    seen = set()
    for each in found:
        module: Any = each.module
        if each.accelerated is None or each.accelerated in POOLS.values():
            continue
        shapes = tuple((p.shape, p.dtype, p.device) for p in module.parameters())
        if (each.operator, shapes) in seen:
            continue
        seen.add((each.operator, shapes))
        with torch.enable_grad():
            _call(each.operator, module, backend)


def _call(operator: str, module: Any, backend: str) -> None:
    if operator == "lora_linear":
        x = module.weight.new_zeros(1, 1, module.in_features).requires_grad_()
        for lora in module.loras.values():
            if not why_not_lora(lora):
                lora_linear(
                    x,
                    module.weight,
                    module.bias,
                    [LoraBranch(lora.lora_A, lora.lora_B)],
                    transposed=module.fan_in_fan_out,
                    backend=backend,
                )
    elif operator == "gated_adapter":
        for adapter in module.adapters.values():
            if not why_not_adapter(adapter):
                down, up = adapter.adapter_down[0].weight, adapter.adapter_up.weight
                x = down.new_zeros(1, 1, down.shape[1]).requires_grad_()
                gated_adapter(x, down, up, backend=backend)
    else:
        weight = module.query.weight
        heads, size = module.num_attention_heads, module.attention_head_size
        q = weight.new_zeros(1, heads, 1, size).requires_grad_()
        prefix = Prefix(*weight.new_zeros(2, 1, heads, size))
        prefix_attention(q, q, q, [prefix], backend=backend)
