"""LoRA and bottlenecks of the library ``adapters`` on `lora_linear` and `gated_adapter`.

Which adapters a call has is read from the library's own state. A call of which an operator would
compute anything else than the library does goes the library's own way.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from adapters.composition import Stack
from adapters.context import ForwardContext
from adapters.methods.bottleneck import BottleneckLayer
from adapters.methods.lora import LoRA, LoRALinearTorch
from adapters.methods.modeling import Adapter, ParallelAdapter
from adapters.models.bert.modeling_bert import BertOutputWithAdapters, BertSelfOutputWithAdapters
from adapters.models.electra.modeling_electra import (
    ElectraOutputWithAdapters,
    ElectraSelfOutputWithAdapters,
)
from adapters.models.roberta.modeling_roberta import (
    RobertaOutputWithAdapters,
    RobertaSelfOutputWithAdapters,
)
from adapters.models.xlm_roberta.modeling_xlm_roberta import (
    XLMRobertaOutputWithAdapters,
    XLMRobertaSelfOutputWithAdapters,
)
from torch import Tensor, nn

from ..nn.original import is_plain, is_watched
from ..ops import LearnedGate, LoraBranch, gated_adapter, lora_linear
from ..ops._arguments import cast_activation
from ..ops.lora_linear.contract import MAX_RANK
from .calls import dropout_rate, fits, is_cheaper_composed, is_dense
from .replacement import Accelerated

# Elements of the output below which Python's part of an operator's call is more than it saves:
# with 2048 a step with LoRA took 1.15 times the library's (2-core Intel with AVX-512, float32),
# with 12288 as long.
PAYS_FROM = 12288
# The classes of transformers' activations, by the names that the operator has for them.
ACTIVATIONS = {
    "ReLU": "relu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "Tanh": "tanh",
    "LinearActivation": "identity",
    "Identity": "identity",
}


def names_in(setup: Any, held: Container[str]) -> list[str]:
    """The adapters that a layer applies one after the other; none where adapters are composed in
    another way.
    """
    if type(setup) is not Stack or not all(isinstance(name, str) for name in setup):
        return []
    return [name for name in setup if name in held]


def keeps_gates() -> bool:
    """Whether this forward collects the gates' values, which the library does in its own layers, or
    there is no forward of a model.
    """
    context = ForwardContext.get_context()
    return context is None or bool(context.output_adapter_gating_scores)


class AcceleratedLoraLinear(Accelerated, LoRALinearTorch):
    """The library's LoRA in a Linear or Conv1D, with base, branch and gate on one read of x."""

    def forward(self, input_states: Tensor) -> Tensor:
        """As the library's: y [B, S, Dout]."""
        y: Tensor
        elements = input_states.shape[:-1].numel() * self.out_features
        if is_cheaper_composed(elements, PAYS_FROM, self.pelt_backend):
            y = LoRALinearTorch.forward(self, input_states)
            return y
        activation = cast_activation(input_states)
        names = names_in(self.get_active_setup(), self.loras)
        # Several in a stack feed each other.
        lora: Any = self.loras[names[0]] if len(names) == 1 else None
        if (
            lora is None
            or self.merged
            or why_not_lora(lora)
            or not is_dense(activation)
            or not fits(activation, self.weight, self.bias, *lora.parameters())
            or (lora.use_gating and (keeps_gates() or activation.ndim != 3))
        ):
            y = LoRALinearTorch.forward(self, input_states)
            return y
        gate = learned_gate(lora.gate) if lora.use_gating else None
        branch = LoraBranch(
            lora.lora_A, lora.lora_B, 0, 1.0 if gate is not None else lora.scaling, gate
        )
        served: Tensor = lora_linear(
            activation,
            self.weight,
            self.bias,
            [branch],
            transposed=self.fan_in_fan_out,
            dropout_p=_rate(lora.lora_dropout) or 0.0,
            backend=self.pelt_backend,
        )
        return served


def why_not_lora(lora: Any) -> str:
    """Why an adapter in a Linear goes the library's own way, as the rest of a sentence."""
    if type(lora) is not LoRA or lora.use_dora:
        return f"{'DoRA' if type(lora) is LoRA else type(lora).__name__} is not plain LoRA"
    if lora.r > MAX_RANK:
        return f"its rank is above {MAX_RANK}"
    if _rate(lora.lora_dropout) is None:
        return "its dropout leaves nothing, or is none of PyTorch's"
    inner = [lora, *lora.children()]
    if any(map(is_watched, inner)) or (lora.use_gating and not is_plain(lora.gate, nn.Linear)):
        return "it has hooks, so it is called as the library does"
    if lora.use_gating and lora.gate.out_features != 1:
        return "it has several gates"
    return ""


class _Bottleneck(Accelerated):
    """The place of a library's layer with bottlenecks: each adapter in one pass over its rows."""

    adapters: Any
    get_active_setup: Any

    def bottleneck_layer_forward(
        self, hidden_states: Tensor, residual_input: Tensor | None, layer_norm: Any
    ) -> Tensor:
        """As the library's: the sub-layer's output with the adapters, its residual and norm."""
        adapters = [
            self.adapters[name] for name in names_in(self.get_active_setup(), self.adapters)
        ]
        activation = cast_activation(hidden_states)
        if (
            not adapters
            or is_cheaper_composed(hidden_states.numel(), PAYS_FROM, self.pelt_backend)
            or not is_dense(activation)
            or residual_input is None
            or residual_input.shape != hidden_states.shape
            or residual_input.dtype != hidden_states.dtype
            or activation.dtype != hidden_states.dtype
            or hidden_states.ndim != 3
            or any(
                why_not_adapter(each) or not fits(activation, *each.parameters())
                for each in adapters
            )
            or (any(each.use_gating for each in adapters) and keeps_gates())
        ):
            y: Tensor = BottleneckLayer.bottleneck_layer_forward(
                self, hidden_states, residual_input, layer_norm
            )
            return y
        entered = hidden_states
        for adapter in adapters:
            read, _, residual = adapter.pre_forward(hidden_states, residual_input, layer_norm)
            hidden_states = _adapted(adapter, read, residual, self.pelt_backend)
        out: Tensor = adapters[-1].post_forward(hidden_states, entered, residual_input, layer_norm)
        return out


def _adapted(adapter: Any, read: Tensor, residual: Tensor, backend: str | None) -> Tensor:
    """What the library's adapter gives: a parallel one is added to its residual later."""
    source: str | Tensor | None = "input" if residual is read else residual
    scale = adapter.scaling
    y = gated_adapter(
        read,
        adapter.adapter_down[0].weight,
        adapter.adapter_up.weight,
        b_down=adapter.adapter_down[0].bias,
        b_up=adapter.adapter_up.bias,
        activation=ACTIVATIONS[type(adapter.non_linearity.f).__name__],
        scale=scale.view(()) if isinstance(scale, Tensor) else scale,
        gate=learned_gate(adapter.gate) if adapter.use_gating else None,
        residual=None if isinstance(adapter, ParallelAdapter) else source,
        dropout_p=_rate(adapter.dropout) or 0.0,
        backend=backend,
    )
    assert isinstance(y, Tensor)
    return y


def why_not_adapter(adapter: Any) -> str:
    """Why a bottleneck goes the library's own way, as the rest of a sentence."""
    if type(adapter) not in (Adapter, ParallelAdapter):
        return f"{type(adapter).__name__} is not the library's own adapter"
    if adapter.add_layer_norm_before or adapter.add_layer_norm_after:
        return "it has a norm of its own"
    if hasattr(adapter, "DropPath"):
        return "it has stochastic depth"
    down, activation = adapter.adapter_down[0], type(adapter.non_linearity.f).__name__
    if activation not in ACTIVATIONS:
        return f"its activation is {activation}"
    if isinstance(adapter.scaling, Tensor) and adapter.scaling.numel() != 1:
        return "it has a scale for each channel"
    if not all(isinstance(each, nn.Linear) for each in (down, adapter.adapter_up)):
        return f"its projections are {type(down).__name__}"
    if _rate(adapter.dropout) is None:
        return "its dropout leaves nothing, or is none of PyTorch's"
    inner = [adapter.adapter_down, adapter.non_linearity, adapter.dropout]
    linears = [down, adapter.adapter_up, *([adapter.gate] if adapter.use_gating else [])]
    if any(map(is_watched, (adapter, *inner))) or not all(
        is_plain(each, nn.Linear) for each in linears
    ):
        return "it has hooks, so it is called as the library does"
    return ""


class AcceleratedBottleneckLayer(_Bottleneck, BottleneckLayer):
    """Of families whose layers have one, and of models that are hooked."""


class AcceleratedBertSelfOutput(_Bottleneck, BertSelfOutputWithAdapters):
    """After BERT's attention."""


class AcceleratedBertOutput(_Bottleneck, BertOutputWithAdapters):
    """After BERT's FFN."""


class AcceleratedElectraSelfOutput(_Bottleneck, ElectraSelfOutputWithAdapters):
    """After ELECTRA's attention."""


class AcceleratedElectraOutput(_Bottleneck, ElectraOutputWithAdapters):
    """After ELECTRA's FFN."""


class AcceleratedRobertaSelfOutput(_Bottleneck, RobertaSelfOutputWithAdapters):
    """After RoBERTa's attention."""


class AcceleratedRobertaOutput(_Bottleneck, RobertaOutputWithAdapters):
    """After RoBERTa's FFN."""


class AcceleratedXLMRobertaSelfOutput(_Bottleneck, XLMRobertaSelfOutputWithAdapters):
    """After XLM-R's attention."""


class AcceleratedXLMRobertaOutput(_Bottleneck, XLMRobertaOutputWithAdapters):
    """After XLM-R's FFN."""


BOTTLENECKS: dict[type[nn.Module], type[nn.Module]] = {
    kind.__bases__[-1]: kind
    for kind in (
        AcceleratedBottleneckLayer,
        AcceleratedBertSelfOutput,
        AcceleratedBertOutput,
        AcceleratedElectraSelfOutput,
        AcceleratedElectraOutput,
        AcceleratedRobertaSelfOutput,
        AcceleratedRobertaOutput,
        AcceleratedXLMRobertaSelfOutput,
        AcceleratedXLMRobertaOutput,
    )
}


def learned_gate(gate: Any) -> LearnedGate:
    """The library's gate: the mean over all tokens, padding included."""
    return LearnedGate(gate.weight[0], gate.bias, "mean")


def _rate(dropout: Any) -> float | None:
    """The rate of a dropout in this call. Without any, LoRA has a function in its place."""
    return dropout_rate(dropout) if isinstance(dropout, nn.Module) else 0.0
