"""What methods for several tasks put into the layers of a model: VLM's adapters, and the adapters
and prefixes that HyperPELT's networks write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..methods import HyperPELTConfig, VLMConfig
from ..nn import (
    AdapterWeights,
    GeneratedWeights,
    HyperCall,
    HyperNetwork,
    PrefixWeights,
    StackSizes,
    StoredWeights,
    TaskAdapters,
    TaskEmbeddings,
    generated_adapter,
)
from ..ops import Prefix, prefix_attention
from ..ops.prefix_attention.weights import attention_weights
from .call import Call
from .task_inputs import ENTRIES, FEATURES, TASKS

LAYER_NORM_EPS = 1e-5  # of a host whose configuration names none


@dataclass
class Written:
    """What HyperPELT's networks write for a model, or what they wrote.

    Attributes:
        weights: asked by each layer for its own.
        call: says which tasks the samples have.
    """

    weights: GeneratedWeights | StoredWeights
    activation: str
    call: Call

    def adapter(self, stack: str, layer: int, batch: int) -> tuple[AdapterWeights, Tensor | None]:
        """The adapters beside a layer's FFN for a batch's samples, and the index [B] into them."""
        if isinstance(self.weights, StoredWeights):
            return self.weights.adapter(stack, layer)
        return self.weights.adapter(stack, layer, self._hyper_call(batch))

    def prefix(
        self, stack: str, layer: int, block: int, batch: int
    ) -> tuple[PrefixWeights, Tensor | None]:
        """An attention's prefixes for a batch's samples, and the index [B] into them."""
        if isinstance(self.weights, StoredWeights):
            return self.weights.prefix(stack, layer, block)
        return self.weights.prefix(stack, layer, block, self._hyper_call(batch))

    def _hyper_call(self, batch: int) -> HyperCall:
        index = self.call.label(TASKS, batch)
        labels = self.call.labels
        return HyperCall(labels[ENTRIES], index, labels.get(FEATURES))


@dataclass
class WrittenAdapter:
    """The adapter beside a layer's FFN."""

    written: Written
    stack: str
    layer: int

    def __call__(self, read: Tensor, ffn_output: Tensor) -> Tensor:
        """``FFN(x) + A(x)`` of what the FFN reads, x, and its output, both [B, S, D]."""
        weights, index = self.written.adapter(self.stack, self.layer, read.shape[0])
        read = read.to(ffn_output.dtype)
        activation = self.written.activation
        return generated_adapter(read, weights, index, activation=activation, residual=ffn_output)


@dataclass
class WrittenPrefix:
    """The prefix of an attention, which stands where `nn.PrefixAttention` does.

    Attributes:
        block: which attention of a layer.
    """

    written: Written
    stack: str
    block: int
    attributes: Mapping[str, Any] | None = None

    def segments(self, layer: int, batch: int) -> tuple[Prefix, ...]:
        """The prefix of a layer, for the samples of this call."""
        (keys, values), index = self.written.prefix(self.stack, layer, self.block, batch)
        return (Prefix(keys, values, index),)

    def __call__(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        labels: None = None,
        **options: Any,
    ) -> Tensor:
        """As `nn.PrefixAttention.forward`."""
        out = prefix_attention(q, k, v, self.segments(layer, q.shape[0]), **options)
        assert isinstance(out, Tensor)
        return out

    def weights(
        self, layer: int, q: Tensor, k: Tensor, *, labels: None = None, **options: Any
    ) -> Tensor:
        """As `nn.PrefixAttention.weights`."""
        return attention_weights(q, k, self.segments(layer, q.shape[0]), **options)


def make_task_adapters(
    config: VLMConfig, model: nn.Module, num_layers: int, placement: dict[str, Any]
) -> nn.ModuleList:
    """VLM's adapters of each layer."""
    host: Any = model.config
    names = ("layer_norm_epsilon", "layer_norm_eps", "rms_norm_eps")
    eps = next((getattr(host, name) for name in names if hasattr(host, name)), LAYER_NORM_EPS)
    return nn.ModuleList(
        TaskAdapters(host.hidden_size, config.bottleneck_of_each(), eps=eps, **placement)
        for _ in range(num_layers)
    )


def make_written(
    config: HyperPELTConfig,
    hidden_size: int,
    stacks: Mapping[str, StackSizes],
    placement: dict[str, Any],
) -> GeneratedWeights | StoredWeights:
    """HyperPELT's networks, one for each stack, or, of a config that says so, their place."""
    sizes: dict[str, Any] = {
        "prefix_length": config.prefix_length,
        "bottleneck": config.bottleneck_of(hidden_size),
    }
    if config.materialized:
        return StoredWeights(stacks, **sizes, **placement)
    options: dict[str, Any] = {
        "embedding_size": config.embedding_size,
        "mid": config.mid,
        **placement,
    }
    tasks = TaskEmbeddings(
        len(config.tasks), config.prefix_length, features=config.features, **options
    )
    networks = {
        name: HyperNetwork(stack, size=config.size, **sizes, **options)
        for name, stack in stacks.items()
    }
    return GeneratedWeights(tasks, networks)


def adapt_layer(adapters: TaskAdapters, call: Call, output: Any) -> Any:
    """A layer's output, or the first of its outputs, with the adapters of its samples' tasks."""
    x: Tensor = output[0] if isinstance(output, tuple) else output
    tasks = call.label(TASKS, x.shape[0])
    if call.labels[TASKS].shape[0] == 1:
        tasks = call.labels[TASKS][0]  # one for the batch: nothing is gathered for each sample
    y = adapters(x, tasks)
    return (y, *output[1:]) if isinstance(output, tuple) else y
