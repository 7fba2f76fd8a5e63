"""Which modules of a layer give way to which: the stand-ins of every part, and whether they may."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..methods import BottleneckAdapterConfig, LoraConfig, Parts
from ..methods.lora import TARGETS
from ..nn import (
    ExpertAdapter,
    ExpertLoRALinear,
    ExpertLowRank,
    FusedPrunedLinear,
    Gate,
    GatedAdapter,
    LowRank,
    PrunedLinear,
    Pruning,
)
from ..nn.original import NAMES, linear_kind, sizes_of, why_not_replaceable
from .layer import PREFIX_GATE, AdaptedFusedLinear, AdaptedLinear, AdaptedNorm, ExpertLinear
from .layer_state import LayerState
from .slots import CROSS, Place, Slots

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Replacement:
    """One module of the base model and the one that stands for it, which holds its weight and bias
    under the same names.
    """

    parent: nn.Module
    name: str
    original: nn.Module
    adapted: nn.Module

    def put_in(self) -> None:
        """The stand-in takes the original's place."""
        self.adapted.train(self.original.training)
        setattr(self.parent, self.name, self.adapted)

    def take_out(self) -> None:
        """The original has its place again, with the parameters that its stand-in has now:
        `to_empty` replaces Parameters.
        """
        for name in NAMES:
            self.original.register_parameter(name, getattr(self.adapted, name))
        self.original.train(self.adapted.training)
        setattr(self.parent, self.name, self.original)

    def check_removable(self, who: str) -> None:
        """Raises ValueError where the original cannot have its parameters back."""
        held = self.adapted._parameters.keys() | self.adapted.__dict__.keys()
        missing = sorted(set(NAMES) - held)
        if missing:
            raise ValueError(
                f"{who}: expected {type(self.parent).__name__}.{self.name} with the parameters it "
                f"had when the method came, got {' and '.join(missing)} computed from others; take "
                "the parametrization or the pruning off first"
            )


@dataclass(frozen=True)
class StandIns:
    """Makes what stands in a layer for modules of the base model.

    Attributes:
        placement: device and dtype of new parameters.
        is_causal: whether a token of this stack sees no later ones.
    """

    slots: Slots
    parts: Parts
    placement: dict[str, Any]
    is_causal: bool

    def in_layer(
        self, layer: nn.Module, state: LayerState, has_pooled_gate: bool
    ) -> Iterator[Replacement]:
        """The replacements of one layer, in the order in which they draw their starting values.

        Args:
            has_pooled_gate: whether the query's Linear computes the gate of the layer's prefix.
        """
        for path, adapted in self._by_path(layer, state, has_pooled_gate):
            parent, _, name = path.rpartition(".")
            original = layer.get_submodule(path)
            yield Replacement(layer.get_submodule(parent), name, original, adapted)

    def _by_path(
        self, layer: nn.Module, state: LayerState, has_pooled_gate: bool
    ) -> Iterator[tuple[str, nn.Module]]:
        slots, parts = self.slots, self.parts
        lora = () if parts.lora is None else parts.lora.targets
        at_output = parts.adapter is not None and slots.ffn_norm is None
        wanted = set(lora)
        wanted |= {"query"} if has_pooled_gate else set()
        wanted |= {"ffn_out"} if at_output else set()
        for path, targets in _by_linear(slots, wanted):
            base = layer.get_submodule(path)
            name = targets[0][0]
            has_gate = has_pooled_gate and name == "query"
            if targets[0][1].is_fused:
                yield path, self._fused(base, targets, state, lora, has_gate)
                continue
            has_branch = _target_of(name) in lora
            has_adapter = at_output and name == "ffn_out"
            yield path, self._linear(base, name, state, has_branch, has_gate, has_adapter)
        if parts.adapter is not None and slots.ffn_norm is not None:
            yield slots.ffn_norm, self._norm(layer.get_submodule(slots.ffn_norm), state)
        pruned = parts.pruning.targets if parts.pruning is not None else ()
        for path, targets in _by_linear(slots, pruned):
            yield path, self._pruned(layer.get_submodule(path), targets)
        for path, targets in _by_linear(slots, _expert_targets(parts)):
            base = layer.get_submodule(path)
            if targets[0][1].is_fused:
                yield path, self._fused_experts(base, targets, state)
            else:
                yield path, self._experts(base)

    def _linear(
        self,
        base: nn.Module,
        target: str,
        state: LayerState,
        has_branch: bool,
        has_gate: bool,
        has_adapter: bool,
    ) -> AdaptedLinear:
        """A Linear with a LoRA branch, with the prefix's gate (the query's), with the adapter on
        its output (the FFN's), or with several of them.
        """
        lora, prefix = self.parts.lora, self.parts.prefix
        return AdaptedLinear(
            base,
            lora.r if lora and has_branch else 0,
            lora.alpha if lora else 1.0,
            dropout=lora.dropout if lora else 0.0,
            gate_pooling=self._pooling(lora),
            extra_gates={PREFIX_GATE: prefix.gate_pooling} if prefix and has_gate else {},
            dtype=self.placement["dtype"],
            state=state,
            target=target,
            adapter=self._adapter(sizes_of(base)[1]) if has_adapter else None,
            is_parallel=self.parts.has_parallel_adapter,
        )

    def _fused(
        self,
        base: nn.Module,
        targets: list[tuple[str, Place]],
        state: LayerState,
        lora_targets: tuple[str, ...],
        has_gate: bool,
    ) -> AdaptedFusedLinear:
        """One Linear for several projections, with a LoRA branch for each target among them."""
        lora, prefix = self.parts.lora, self.parts.prefix
        into, out = sizes_of(base)
        branches, offsets = {}, {}
        for name, place in targets:
            if lora is not None and _target_of(name) in lora_targets:
                size = out // place.parts
                offsets[name] = place.part * size
                pooling = self._pooling(lora)
                branches[name] = LowRank(into, size, lora.r, lora.alpha, pooling, **self.placement)
        gates = {}
        if has_gate and prefix is not None:
            gates[PREFIX_GATE] = Gate(into, prefix.gate_pooling, **self.placement)
        return AdaptedFusedLinear(
            base,
            branches,
            offsets,
            dropout=lora.dropout if lora else 0.0,
            extra_gates=gates,
            state=state,
        )

    def _fused_experts(
        self, base: nn.Module, targets: list[tuple[str, Place]], state: LayerState
    ) -> AdaptedFusedLinear:
        """One Linear for several projections, with AdaMix's branches for each target."""
        mixture = self.parts.mixture
        assert mixture is not None
        into, out = sizes_of(base)
        branches, offsets = {}, {}
        for name, place in targets:
            size = out // place.parts
            offsets[name] = place.part * size
            branches[name] = ExpertLowRank(
                into,
                size,
                mixture.r,
                mixture.alpha,
                mixture.bank_sizes(),
                mixture.identical_start,
                **self.placement,
            )
        return AdaptedFusedLinear(base, branches, offsets, dropout=mixture.dropout, state=state)

    def _pooling(self, part: LoraConfig | BottleneckAdapterConfig | None) -> str | None:
        """How a part's gate pools here: in a decoder, where a word may not depend on later ones,
        each token has its own.
        """
        if part is None or not part.gated:
            return None
        return "token" if self.is_causal else part.gate_pooling

    def _norm(self, base: Any, state: LayerState) -> AdaptedNorm:
        adapter = self._adapter(base.normalized_shape[0])
        return AdaptedNorm(base, adapter, state, self.parts.has_parallel_adapter)

    def _adapter(self, hidden_size: int) -> GatedAdapter:
        adapter = self.parts.adapter
        assert adapter is not None
        return GatedAdapter(
            hidden_size,
            adapter.bottleneck_of(hidden_size),
            activation=adapter.activation,
            gate_pooling=self._pooling(adapter),
            dropout=adapter.dropout,
            scale=adapter.scale,
            start=adapter.start,
            **self.placement,
        )

    def _pruned(
        self, base: nn.Module, targets: list[tuple[str, Place]]
    ) -> PrunedLinear | FusedPrunedLinear:
        """A pruned Linear; of one for several projections, the matrix of each target by itself."""
        pst = self.parts.pruning
        assert pst is not None
        factors = {"beta": pst.beta, "alpha1": pst.alpha1, "alpha2": pst.alpha2}
        if not targets[0][1].is_fused:
            return PrunedLinear(base, pst.r1, pst.r2, dtype=self.placement["dtype"], **factors)
        into, out = sizes_of(base)
        matrices, offsets = {}, {}
        for name, place in targets:
            size = out // place.parts
            offsets[name] = place.part * size
            matrices[name] = Pruning(size, into, pst.r1, pst.r2, **factors, **self.placement)
        return FusedPrunedLinear(base, matrices, offsets)

    def _experts(self, base: Any) -> ExpertLinear | ExpertLoRALinear:
        mixture = self.parts.mixture
        assert mixture is not None
        if mixture.kind == "lora":
            return ExpertLoRALinear(
                base,
                mixture.r,
                mixture.alpha,
                mixture.bank_sizes(),
                dropout=mixture.dropout,
                identical_start=mixture.identical_start,
                dtype=self.placement["dtype"],
            )
        out = sizes_of(base)[1]
        experts = ExpertAdapter(
            out,
            mixture.as_adapter().bottleneck_of(out),
            mixture.bank_sizes(),
            activation=mixture.activation,
            dropout=mixture.dropout,
            **self.placement,
        )
        return ExpertLinear(base, experts)


def check_places(model: PreTrainedModel, layers: nn.ModuleList, slots: Slots, parts: Parts) -> None:
    """Raises ValueError unless every module that the parts replace, in every layer, may be
    replaced, with the first one's name; and where a hook holds the model's weights elsewhere.
    """
    for name, module in model.named_modules():
        is_empty = any(parameter.is_meta for parameter in module.parameters(recurse=False))
        if is_empty and hasattr(module, "_hf_hook"):
            raise ValueError(
                "get_pelt_model: expected a base model whose weights are in memory, got "
                f"{name} with weights that accelerate loads at each call; load it without "
                "offloading (accelerate.hooks.remove_hook_from_submodules)"
            )
    names = {id(module): name for name, module in model.named_modules()}
    for layer in layers:
        for path, kind in _paths(slots, parts):
            module = layer.get_submodule(path)
            kind = linear_kind(module) if kind is nn.Linear else kind
            reason = why_not_replaceable(module, kind)
            if reason:
                raise ValueError(
                    f"get_pelt_model: expected {names[id(module)]} as an nn.{kind.__name__} with "
                    f"floating-point weight and bias, got {reason}"
                )


def _paths(slots: Slots, parts: Parts) -> Iterator[tuple[str, type[nn.Module]]]:
    """The paths in a layer of what the parts replace, and what has to be there."""
    targets: set[str] = set(_expert_targets(parts))
    if parts.lora is not None:
        targets |= set(parts.lora.targets)
    if parts.prefix is not None and parts.prefix.gated:
        targets.add("query")
    if parts.pruning is not None:
        targets |= set(parts.pruning.targets)
    if parts.adapter is not None and slots.ffn_norm is None:
        targets.add("ffn_out")
    for path, _ in _by_linear(slots, targets):
        yield path, nn.Linear
    if parts.adapter is not None and slots.ffn_norm is not None:
        yield slots.ffn_norm, nn.LayerNorm


def _by_linear(
    slots: Slots, targets: Collection[str]
) -> Iterator[tuple[str, list[tuple[str, Place]]]]:
    """The Linears of a layer in which targets are, each with its projections by name."""
    found: dict[str, list[tuple[str, Place]]] = {}
    for target in TARGETS:
        if target in targets:
            for name, place in slots.places(target):
                found.setdefault(place.path, []).append((name, place))
    yield from found.items()


def _target_of(name: str) -> str:
    """The target that a projection's name in a layer belongs to (`Slots.places`)."""
    return name.removeprefix(f"{CROSS}_").removesuffix("_2")


def _expert_targets(parts: Parts) -> tuple[str, ...]:
    """The Linears of a layer that AdaMix replaces."""
    if parts.mixture is None:
        return ()
    return ("ffn_out",) if parts.mixture.kind == "adapter" else parts.mixture.targets
