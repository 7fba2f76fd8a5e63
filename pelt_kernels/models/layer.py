"""The forward of one layer with a method in it, in the order in which it runs.

In a BERT layer, with every part; what a method leaves out is the base model's own:

    module                  what runs there              takes from the state     leaves in it
    (the layer)             check_random_state, before it
    attention.self          read_mask, before it                                  mask
      query                 AdaptedLinear                (reads mask)             prefix gate
      key, value            AdaptedLinear                (reads mask)
      attention function    attention_forward            prefix gate
    attention.output.dense  AdaptedLinear                (reads mask)
    intermediate.dense      keep_ffn_input, before it                             FFN's input
                            AdaptedLinear                (reads mask)
    output.dense            AdaptedLinear, ExpertLinear  (reads mask)
    output.LayerNorm        AdaptedNorm                  mask, FFN's input
                            or end_layer, before it      mask

The modules of a layer do not call each other, so three values travel in the layer's state. Each is
left by the step that has it and taken, which clears it, by the last that wants it; all within the
modules of one layer, because transformers checkpoints a layer's forward: hooks of the layer are
outside of what is computed again, its modules and their hooks inside.

`PrunedLinear` and `ExpertLoRALinear` need nothing of the state: they stand in a layer as they are.
`slots.py` says at which module of a family a step happens, `hooks_of` and `replacement.StandIns`
put it there. A layer of another shape adds one step: an adapter where no LayerNorm follows is a
stand-in for the FFN's second Linear beside `ExpertLinear`; a fused query, key and value is one
beside `AdaptedLinear`, with a branch for each range of columns; an attention over other tokens has
a `LayerPrefix` of its own, shares the state, whose prefix gate is taken before the next is left,
and leaves no mask.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..methods import Parts
from ..nn import ExpertAdapter, GatedAdapter, LoRALinear, PrefixAttention
from ..nn.lora_linear import BRANCH_GATE
from ..nn.original import Original
from ..ops.prefix_attention.weights import attention_weights
from .attention import base_attention, register_attention
from .attention_config import PELT, AttentionView
from .slots import Slots

logger = logging.get_logger(__name__)

Hook = Callable[..., None]

# Attributes under which modules of the base model hold what the functions below need.
STATE_ATTRIBUTE = "_pelt_state"
PREFIX_ATTRIBUTE = "_pelt_prefix"

PREFIX_GATE = "prefix"


def hooks_of(
    slots: Slots, parts: Parts, uses_attention: bool, needs_mask: bool
) -> Iterator[tuple[str, Hook]]:
    """The forward pre-hooks of a layer, each with the path of its module, in the order in which
    they run.
    """
    if parts.mixture is not None:
        yield "", check_random_state
    if uses_attention:
        yield slots.attention.module, read_mask
    if parts.has_parallel_adapter:
        yield slots.ffn_in, keep_ffn_input
    if needs_mask and parts.adapter is None:
        yield slots.ffn_norm, end_layer


class InFlight(threading.local):
    """What travels between the modules of one layer during one forward of that layer.

    It is written and read within a layer's forward, so the recomputation of a checkpointed layer
    writes its own, and it belongs to one thread, so a model that serves several threads (or is
    replicated over them) does not mix sentences.
    """

    mask: Tensor | None = None
    prefix_gate: Tensor | None = None
    ffn_input: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> InFlight:
        return InFlight()

    def __reduce__(self) -> tuple[type[InFlight], tuple[()]]:
        return InFlight, ()


class LayerState:
    """What is known about one layer, hung on the modules of it that read or write it.

    Args:
        number: the layer's, from 0.
        needs_mask: whether a gate of this layer pools over real tokens only.
    """

    def __init__(self, number: int, needs_mask: bool) -> None:
        self.number, self.needs_mask = number, needs_mask
        self.in_flight = InFlight()
        self.is_recording = False
        self.gate_values: dict[str, Tensor] = {}

    @property
    def mask(self) -> Tensor | None:
        """The padding mask [B, N] bool of this forward, where a gate needs it."""
        return self.in_flight.mask

    def leave_mask(self, mask: Tensor | None) -> None:
        """A layer begins: the mask, and no gate from a forward that was broken off."""
        self.in_flight.mask = mask if self.needs_mask else None
        self.in_flight.prefix_gate = None

    def take_mask(self) -> Tensor | None:
        """The layer ends: no mask outlives it."""
        mask, self.in_flight.mask = self.in_flight.mask, None
        return mask

    def leave_prefix_gate(self, gate: Tensor) -> None:
        """The prefix's gate [B], which is computed from what the query's Linear reads."""
        self.in_flight.prefix_gate = gate

    def take_prefix_gate(self) -> Tensor | None:
        gate, self.in_flight.prefix_gate = self.in_flight.prefix_gate, None
        return gate

    def leave_ffn_input(self, x: Tensor) -> None:
        """The FFN's input [B, S, D], which a parallel adapter reads at the layer's end."""
        self.in_flight.ffn_input = x

    def take_ffn_input(self) -> Tensor | None:
        x, self.in_flight.ffn_input = self.in_flight.ffn_input, None
        return x

    def record(self, kind: str, value: Tensor) -> None:
        """Keeps the latest value of a gate, on its device, without waiting for it."""
        if self.is_recording:
            self.gate_values[kind] = value.detach()


@dataclass
class LayerPrefix:
    """Which prefix an attention has: a row of the model's, and whether a gate scales it."""

    prefixes: PrefixAttention
    row: int
    is_gated: bool


def check_random_state(layer: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of a layer: the experts of a checkpointed layer are drawn again from the
    random state in which its forward drew them, so that state has to be kept.
    """
    checkpoint = getattr(layer, "_gradient_checkpointing_func", None)
    keeps = getattr(checkpoint, "keywords", {}).get("preserve_rng_state", True)
    if not keeps and getattr(layer, "gradient_checkpointing", False) and layer.training:
        raise ValueError(
            "AdaMixConfig: expected gradient checkpointing with preserve_rng_state=True (a layer "
            "that is computed again draws the experts of its forward again), got False"
        )


def check_mask(mask: Any) -> None:
    """Raises ValueError unless the mask is None or a padding mask [B, N] bool."""
    if mask is not None and (
        not isinstance(mask, Tensor) or mask.ndim != 2 or mask.dtype != torch.bool
    ):
        got = (
            f"{list(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        )
        raise ValueError(
            "pelt attention: expected attention_mask [B, N] with 1 for tokens and 0 for padding, "
            f"got {got}; masks for "
            "single query-key pairs are not supported by gates and prefixes (generate() makes one "
            "unless cache_implementation is left at its default)"
        )


def read_mask(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an attention module: leaves the mask that is an argument of this very
    call.
    """
    config: Any = attention.config
    if config._attn_implementation != PELT:
        raise ValueError(
            f"pelt attention: expected the attention implementation {PELT!r} (set by "
            "get_pelt_model), got "
            f"{config._attn_implementation!r}; it was changed afterwards. Choose the base "
            "model's attention before "
            "get_pelt_model"
        )
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    check_mask(mask)
    state: LayerState = getattr(attention, STATE_ATTRIBUTE)
    state.leave_mask(mask)


class AdaptedLinear(LoRALinear):
    """A `LoRALinear` in a layer: it reads the layer's mask and leaves the prefix's gate."""

    def __init__(
        self, base: nn.Linear, *args: Any, state: LayerState, target: str, **kwargs: Any
    ) -> None:
        super().__init__(base, *args, **kwargs)
        self.state, self.target = state, target

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """y [B, S, Dout], as the Linear it stands for."""
        y, gates = super().forward(x, self.state.mask)
        if PREFIX_GATE in gates:
            self.state.leave_prefix_gate(gates[PREFIX_GATE])
            self.state.record("prefix", gates[PREFIX_GATE])
        if BRANCH_GATE in gates:
            self.state.record(f"lora_{self.target}", gates[BRANCH_GATE])
        return y


def wants_weights(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether this call is asked for attention weights, as transformers decides it; then says once
    what that costs.
    """
    default = getattr(module.config, "output_attentions", False)
    if not kwargs.get("output_attentions", default):
        return False
    if not torch.compiler.is_compiling():
        logger.warning_once(
            "pelt attention: output_attentions=True: the weights [B, H, S, P + N] are computed by "
            "PyTorch beside the kernels, which never make them, prefix columns first; leave it out "
            "where speed and memory matter"
        )
    return True


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function for "pelt": a layer with a prefix attends to it, any other
    as the base model was loaded to.

    Args:
        query, key, value: [B, H, S, E] views; nothing is copied.
        attention_mask: [B, N] bool or None.

    Returns:
        out [B, S, H, E], and None; with output_attentions=True the weights [B, H, S, P + N], before
        dropout, with the prefix's columns in front, as a prefix in a cache gives them. A layer
        without a prefix has P = 0. They are computed beside the output, which stays what it is.

    Raises:
        ValueError: a mask that is not a padding mask.
    """
    state: LayerState | None = getattr(module, STATE_ATTRIBUTE, None)
    # Without a state: a model of its own, built from the configuration of one with a method.
    if state is None and not isinstance(module.config, AttentionView):
        raise ValueError(
            "pelt attention: expected a layer prepared by get_pelt_model, got a "
            f"{type(module).__name__} without; "
            "the attention implementation 'pelt' cannot be chosen by hand"
        )
    check_mask(attention_mask)
    # Keys from a cache hold no prefix: it joins them at each step anew.
    causal = bool(getattr(module, "is_causal", False))
    # The same for the kernel and for the weights of those who want to see them.
    options: dict[str, Any] = {"key_mask": attention_mask, "is_causal": causal, "scale": scaling}
    own: LayerPrefix | None = getattr(module, PREFIX_ATTRIBUTE, None)
    if state is None or own is None:
        out, weights = base_attention(
            module, query, key, value, attention_mask, causal, scaling, dropout, kwargs
        )
        if weights is None and wants_weights(module, kwargs):
            weights = attention_weights(query, key, **options)
        return out, weights
    gate = state.take_prefix_gate()
    if own.is_gated and gate is None:
        raise RuntimeError(
            f"pelt attention: layer {state.number} has a gated prefix but its query projection was "
            "not called before "
            "the attention"
        )
    out = own.prefixes(own.row, query, key, value, gate=gate, dropout_p=dropout, **options)
    weights = None
    if wants_weights(module, kwargs):
        weights = own.prefixes.weights(own.row, query, key, gate=gate, **options)
    return out.transpose(1, 2), weights


# Here and not where a method is put in: a pickled model meets this module and nothing else.
register_attention(attention_forward)


def keep_ffn_input(ffn_in: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of the FFN's first Linear, for a parallel adapter."""
    state: LayerState = getattr(ffn_in, STATE_ATTRIBUTE)
    state.leave_ffn_input(args[0])


class ExpertLinear(nn.Module):
    """The FFN's second Linear and the experts on its output: ``f = x Wᵀ + b``, ``y = experts(f)``.

    weight and bias are the Linear's own parameters under the same names.
    """

    def __init__(self, base: nn.Linear, experts: ExpertAdapter) -> None:
        super().__init__()
        self.original = Original(base, nn.Linear)
        self.weight, self.bias = base.weight, base.bias
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        """y [B, S, D]."""
        if self.original.is_plain:
            f = nn.functional.linear(x, self.weight, self.bias)
        else:
            f = self.original(self, x)
        y: Tensor = self.experts(f)
        return y


class AdaptedNorm(nn.Module):
    """``out = LN( g·u + s )`` with u the adapter of ``z = LN(s)``: the layer's frozen LayerNorm,
    used twice. With ``is_parallel`` u is the adapter of the FFN's input.

    s [B, S, D] is the FFN's output plus its residual, which is what the LayerNorm it stands for is
    given. weight and bias are the LayerNorm's own parameters under the same names. Hooks of the
    LayerNorm fire once in a forward, for the layer's output: they see ``g·u + s`` and out.
    """

    def __init__(
        self, base: nn.LayerNorm, adapter: GatedAdapter, state: LayerState, is_parallel: bool
    ) -> None:
        super().__init__()
        self.original = Original(base, nn.LayerNorm)
        self.normalized_shape, self.eps = base.normalized_shape, base.eps
        self.weight, self.bias = base.weight, base.bias
        self.adapter = adapter
        self.state, self.is_parallel = state, is_parallel

    def forward(self, s: Tensor) -> Tensor:
        """out [B, S, D]."""
        mask, ffn_input = self.state.take_mask(), self.state.take_ffn_input()
        read = ffn_input if self.is_parallel else self._norm(s)
        is_gated = self.adapter.gate is not None
        y, gate = self.adapter(read, residual=s, mask=mask if is_gated else None, return_gate=True)
        if is_gated:
            self.state.record("adapter", gate)
        return self._norm(y) if self.original.is_plain else self.original(self, y)

    def _norm(self, s: Tensor) -> Tensor:
        if self.original.has_own_forward:
            return self.original.without_hooks(self, s)
        return nn.functional.layer_norm(s, self.normalized_shape, self.weight, self.bias, self.eps)


def end_layer(ffn_norm: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of the last LayerNorm of a layer without an adapter."""
    state: LayerState = getattr(ffn_norm, STATE_ATTRIBUTE)
    state.take_mask()
