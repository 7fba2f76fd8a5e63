"""The forward of one layer with a method in it, in the order in which it runs.

In a BERT layer, with every part; what a method leaves out is the base model's own:

    module                  what runs there              takes from the state     leaves in it
    (the layer)             check_random_state, before it
                            pack_tokens, before it                                packing
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
    (the layer)             unpack_tokens, after it      packing

A layer that normalises before its sub-layers ends with the FFN's second Linear: its adapter is in
the AdaptedLinear there, on the FFN's output before its residual, and end_layer is behind it. An
AdaptedFusedLinear stands for a query, key and value in one. An attention over an encoder follows
the layer's own; it shares the state and leaves no mask. One that computes its scores by itself
cannot have a prefix, and its mask is read in another form (`READ_OWN_MASK`).

A layer whose weights serve several depths (ALBERT's) has one set of parts and one state, which each
use of the layer fills and empties again.

The modules of a layer do not call each other, so three values travel in the layer's state. Each is
left by the step that has it and taken, which clears it, by the last that wants it; all within the
modules of one layer, because transformers checkpoints a layer's forward: hooks of the layer are
outside of what is computed again, its modules and their hooks inside. Therefore nothing is packed
in a layer that is checkpointed.

`PrunedLinear` and `ExpertLoRALinear` need nothing of the state: they stand in a layer as they are.
So does a `LoRALinear`, which LoRA puts outside of the layers and in models of other families.
`slots.py` says at which module of a family a step happens, `hooks_of` and `replacement.StandIns`
put it there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..methods import Parts
from ..nn import ExpertAdapter, FusedLoRALinear, GatedAdapter, LoRALinear
from ..nn.gate import BRANCH_GATE, GateRule
from ..nn.original import Original, linear_kind, product
from ..ops.prefix_attention.without_prefix import is_plain_call
from .attention_config import PELT
from .attention_masks import check_mask
from .layer_state import STATE_ATTRIBUTE, LayerState
from .samples import MixedState
from .slots import ADDED, PRODUCT, Slots
from .task_parts import adapt_layer

PREFIX_GATE = "prefix"


class Hook(NamedTuple):
    """A step that a hook takes before the forward of a module of the layer, or after it."""

    path: str
    call: Callable[..., Any]
    is_after: bool = False
    takes_kwargs: bool = False
    is_first: bool = False  # among the module's hooks, others' included


def hooks_of(
    slots: Slots, parts: Parts, uses_attention: bool, needs_mask: bool, packs: bool = False
) -> Iterator[Hook]:
    """The hooks of a layer in the order in which they run."""
    if parts.mixture is not None:
        yield Hook("", check_random_state)
    if packs:
        yield Hook("", pack_tokens, takes_kwargs=True)
    own_mask = slots.attention.own_mask
    if own_mask and needs_mask:
        yield Hook(slots.attention.module, READ_OWN_MASK[own_mask])
    elif uses_attention:
        yield Hook(slots.attention.module, read_mask, takes_kwargs=True)
    if parts.has_parallel_adapter:
        yield Hook(slots.places("ffn_in")[0][1].path, keep_ffn_input)
        if parts.hyper is not None:
            yield Hook(slots.ffn_out, add_written_adapter, is_after=True)
    if needs_mask and parts.adapter is None:
        if slots.ffn_norm is not None:
            yield Hook(slots.ffn_norm, end_layer)
        else:
            yield Hook(slots.ffn_out, end_layer, is_after=True)
    if parts.vlm is not None:
        yield Hook("", add_task_adapter, is_after=True)
    if packs:
        # Before the hooks by which transformers keeps hidden states.
        yield Hook("", unpack_tokens, is_after=True, is_first=True)


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


def pack_tokens(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Forward pre-hook of a layer: it is given the real tokens only, [1, T, D], where that pays."""
    state: LayerState = getattr(layer, STATE_ATTRIBUTE)
    state.in_flight.packing = None  # of a forward that was broken off
    x, *others = args
    mask = kwargs.get("attention_mask", others[0] if others else None)
    is_checkpointed = getattr(layer, "gradient_checkpointing", False) and layer.training
    if mask is None or is_checkpointed or state.skip_below is not None or not is_plain_call(x):
        return None
    check_mask(mask)
    packing = state.call.packing_by(mask)
    if packing is None:
        return None
    state.in_flight.packing = packing
    return (packing.pack(x), *others), kwargs


def unpack_tokens(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of a layer: its output [B, S, D], with zeros for padding."""
    state: LayerState = getattr(layer, STATE_ATTRIBUTE)
    packing, state.in_flight.packing = state.in_flight.packing, None
    if packing is None:
        return output
    if isinstance(output, tuple):
        return packing.unpack(output[0]), *output[1:]
    return packing.unpack(output)


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
    mask = kwargs.get("attention_mask", kwargs.get("mask", args[1] if len(args) > 1 else None))
    check_mask(mask)
    state: LayerState | MixedState = getattr(attention, STATE_ATTRIBUTE)
    state.leave_mask(mask)


def read_product_mask(attention: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of an attention that computes its own scores: a token sees itself where it
    is real, so the padding mask is the diagonal of the mask [B, 1, N, N] of this very call.
    """
    state: LayerState | MixedState = getattr(attention, STATE_ATTRIBUTE)
    state.leave_mask(_diagonal(args[1]) != 0)


def read_added_mask(attention: nn.Module, args: tuple[Any, ...]) -> None:
    """As `read_product_mask`, of a mask that is added to the scores, or None."""
    state: LayerState | MixedState = getattr(attention, STATE_ATTRIBUTE)
    state.leave_mask(None if args[1] is None else _diagonal(args[1]) == 0)


def _diagonal(mask: Tensor) -> Tensor:
    return mask[:, 0].diagonal(dim1=-2, dim2=-1)


READ_OWN_MASK = {PRODUCT: read_product_mask, ADDED: read_added_mask}


class AdaptedLinear(LoRALinear):
    """A `LoRALinear` in a layer: it reads the layer's mask and leaves the prefix's gate.

    With an adapter it is the FFN's second Linear in a layer that normalises before its sub-layers:
    ``y = f + s · g · u(f)`` of its output f, or with ``is_parallel`` u of the FFN's input.
    """

    def __init__(
        self,
        base: nn.Module,
        *args: Any,
        state: LayerState,
        target: str,
        adapter: GatedAdapter | None = None,
        is_parallel: bool = False,
        **kwargs: Any,
    ) -> None:
        # What is trained is the model's to say: BitFit trains biases, and some train everything.
        super().__init__(base, *args, freeze=False, **kwargs)
        self.state, self.target = state, target
        self.adapter, self.is_parallel = adapter, is_parallel

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """y [B, S, Dout], as the Linear it stands for."""
        y, gates = super().forward(
            x,
            self.state.mask,
            return_gates=True,
            rule=rule_of(self, self.target),
            skip_below=self.state.skip_below,
        )
        leave_gates(self.state, gates, self.target)
        if self.adapter is None:
            return y
        ffn_input = self.state.take_ffn_input()
        read = ffn_input if self.is_parallel else y
        return adapted(self.adapter, read, y, self.state)


class AdaptedFusedLinear(FusedLoRALinear):
    """A `FusedLoRALinear` in a layer, as `AdaptedLinear`; targets are the branches' names."""

    def __init__(self, base: nn.Module, *args: Any, state: LayerState, **kwargs: Any) -> None:
        super().__init__(base, *args, **kwargs)
        self.state = state

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """y [B, S, Dout], as the Linear it stands for."""
        y, gates = super().forward(
            x,
            self.state.mask,
            return_gates=True,
            rule=rule_of(self),
            skip_below=self.state.skip_below,
        )
        leave_gates(self.state, gates)
        return y


def leave_gates(state: LayerState, gates: dict[str, Tensor], target: str = "") -> None:
    """Leaves the prefix's gate for the attention and records the branches' own."""
    for name, value in gates.items():
        if name == PREFIX_GATE:
            state.leave_prefix_gate(value)
        state.record(gate_kind(name, target), value)


def rule_of(linear: AdaptedLinear | AdaptedFusedLinear, target: str = "") -> GateRule | None:
    """What is done to the gates of a Linear before they scale something, if anything."""
    return _rule(linear.state, linear, lambda name: gate_kind(name, target))


def _rule(state: LayerState, part: nn.Module, kind_of: Callable[[str], str]) -> GateRule | None:
    """What is done to the gates of a part, of whose names `kind_of` makes kinds."""
    if not state.wants_values(part.training):
        return None
    return lambda name, value: state.ruled(kind_of(name), value)


def gate_kind(name: str, target: str = "") -> str:
    """Under which kind the gates of a Linear are recorded."""
    if name == PREFIX_GATE:
        return "prefix"
    return f"lora_{target if name == BRANCH_GATE else name}"


def adapted(
    adapter: GatedAdapter, read: Tensor | None, residual: Tensor, state: LayerState
) -> Tensor:
    """The adapter of what it reads, plus the residual; it ends the layer."""
    mask = state.take_mask()
    is_gated = adapter.gate is not None
    source = "input" if read is residual else residual
    y, gate = adapter(
        read,
        residual=source,
        mask=mask if is_gated else None,
        return_gate=True,
        rule=_rule(state, adapter, lambda name: "adapter"),
        skip_below=state.skip_below,
    )
    if is_gated:
        state.record("adapter", gate)
    out: Tensor = y
    return out


def keep_ffn_input(ffn_in: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of the FFN's first Linear, for a parallel adapter."""
    state: LayerState | MixedState = getattr(ffn_in, STATE_ATTRIBUTE)
    state.leave_ffn_input(args[0])


class ExpertLinear(nn.Module):
    """The FFN's second Linear and the experts on its output: ``f = x Wᵀ + b``, ``y = experts(f)``.

    weight and bias are the Linear's own parameters under the same names.
    """

    bias: nn.Parameter | None

    def __init__(self, base: Any, experts: ExpertAdapter) -> None:
        super().__init__()
        self.original = Original(base, linear_kind(base))
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        """y [B, S, D]."""
        if self.original.is_plain:
            f = product(x, self.weight, self.bias, self.original.is_transposed)
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
        ffn_input = self.state.take_ffn_input()
        read = ffn_input if self.is_parallel else self._norm(s)
        y = adapted(self.adapter, read, s, self.state)
        return self._norm(y) if self.original.is_plain else self.original(self, y)

    def _norm(self, s: Tensor) -> Tensor:
        if self.original.has_own_forward:
            return self.original.without_hooks(self, s)
        return nn.functional.layer_norm(s, self.normalized_shape, self.weight, self.bias, self.eps)


def add_written_adapter(ffn_out: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook of the FFN's second Linear: what HyperPELT's adapter makes of the FFN's input is
    added to its output.
    """
    state: LayerState = getattr(ffn_out, STATE_ATTRIBUTE)
    read = state.take_ffn_input()
    assert read is not None and state.written_adapter is not None
    return state.written_adapter(read, output)


def add_task_adapter(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of a layer: VLM's adapters, the last thing in it."""
    state: LayerState = getattr(layer, STATE_ATTRIBUTE)
    assert state.task_adapters is not None
    return adapt_layer(state.task_adapters, state.call, output)


def end_layer(module: nn.Module, *args: Any) -> None:
    """Hook of the module with which a layer without an adapter ends."""
    state: LayerState = getattr(module, STATE_ATTRIBUTE)
    state.take_mask()
