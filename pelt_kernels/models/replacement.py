"""Which modules of a layer give way to which: the stand-ins of every part, and whether they may."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..methods import BottleneckAdapterConfig, LoraConfig, Parts
from ..methods.lora import TARGETS
from ..nn import (
    ExpertAdapter,
    ExpertLoRALinear,
    ExpertLowRank,
    FusedPrunedLinear,
    Gate,
    GatedAdapter,
    LoRALinear,
    LowRank,
    PrunedLinear,
    Pruning,
)
from ..nn.original import NAMES, WAY_OUT, dtype_beside, sizes_of
from ..nn.quantised import is_quantised
from .layer import (
    PREFIX_GATE,
    AdaptedFusedLinear,
    AdaptedLinear,
    AdaptedNorm,
    ExpertLinear,
)
from .layer_state import LayerState
from .lora_targets import WHOLE, Branch, Chosen
from .slots import Place, Slots

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Replacement:
    """One module of the base model and the one that stands for it, which holds its weight and bias
    under the same names as long as it does: one that is out of the model has its own parts only.
    """

    parent: nn.Module
    name: str
    original: nn.Module
    adapted: nn.Module

    def put_in(self) -> None:
        """The stand-in takes the original's place."""
        self.lend()
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
        self.take_back()

    def lend(self) -> None:
        """The stand-in has the original's parameters, too."""
        for name in NAMES:
            self.adapted.register_parameter(name, getattr(self.original, name))

    def take_back(self) -> None:
        """The original alone has its parameters."""
        for name in NAMES:
            self.adapted.register_parameter(name, None)

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
        chosen: the Linears on which LoRA works, by their ids.
        placement: device and dtype of new parameters.
        is_causal: whether a token of this stack sees no later ones.
    """

    slots: Slots
    parts: Parts
    chosen: Mapping[int, Chosen]
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
        at_output = parts.adapter is not None and slots.ffn_norm is None
        for path, projections in slots.linears(TARGETS):
            base = layer.get_submodule(path)
            branches = self.chosen[id(base)].branches if id(base) in self.chosen else {}
            names = [name for name, _ in projections]
            has_gate = has_pooled_gate and "query" in names
            has_adapter = at_output and "ffn_out" in names
            if not (branches or has_gate or has_adapter):
                continue
            if projections[0][1].is_fused and WHOLE not in branches:
                yield path, self._fused(base, projections, state, branches, has_gate)
                continue
            # A branch into all of several projections goes by the name of its module.
            target = path.rpartition(".")[2] if WHOLE in branches else names[0]
            branch = next(iter(branches.values()), None)
            yield path, self._linear(base, target, state, branch, has_gate, has_adapter)
        if parts.adapter is not None and slots.ffn_norm is not None:
            yield slots.ffn_norm, self._norm(layer.get_submodule(slots.ffn_norm), state)
        pruned = parts.pruning.targets if parts.pruning is not None else ()
        for path, targets in slots.linears(pruned):
            yield path, self._pruned(layer.get_submodule(path), targets)
        for path, targets in slots.linears(expert_targets(parts)):
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
        branch: Branch | None,
        has_gate: bool,
        has_adapter: bool,
    ) -> AdaptedLinear:
        """A Linear with a LoRA branch, with the prefix's gate (the query's), with the adapter on
        its output (the FFN's), or with several of them.
        """
        lora, prefix = self.parts.lora, self.parts.prefix
        return AdaptedLinear(
            base,
            branch.r if branch else 0,
            branch.alpha if branch else 1.0,
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
        chosen: Mapping[str, Branch],
        has_gate: bool,
    ) -> AdaptedFusedLinear:
        """One Linear for several projections, with a LoRA branch for each target among them."""
        lora, prefix = self.parts.lora, self.parts.prefix
        into, out = sizes_of(base)
        branches, offsets = {}, {}
        for name, place in targets:
            if name in chosen:
                size = out // place.parts
                offsets[name] = place.part * size
                pooling = self._pooling(lora)
                branches[name] = LowRank(into, size, *chosen[name], pooling, **self.placement)
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


def branched_linears(
    model: PreTrainedModel, config: LoraConfig | None, chosen: Iterable[Chosen]
) -> Iterator[Replacement]:
    """The replacements of Linears that are no places of a layer: outside of the layers, or in a
    model of another family.
    """
    for linear in chosen:
        assert config is not None
        (branch,) = linear.branches.values()
        adapted = LoRALinear(
            linear.module,
            branch.r,
            branch.alpha,
            dropout=config.dropout,
            dtype=parameter_placement(linear.module)["dtype"],
            freeze=False,
        )
        parent, _, name = linear.name.rpartition(".")
        yield Replacement(model.get_submodule(parent), name, linear.module, adapted)


def parameter_placement(linear: nn.Module) -> dict[str, Any]:
    """Where new parameters live; float32 beside 16-bit weights, which would lose small updates, and
    beside quantised ones.
    """
    weight: Any = linear.weight
    if not is_quantised(linear) and not (isinstance(weight, Tensor) and weight.is_floating_point()):
        kind = type(linear)
        raise ValueError(
            "get_pelt_model: expected a model with floating-point weights, got "
            f"{kind.__name__} of {kind.__module__} with "
            f"{getattr(weight, 'dtype', type(weight).__name__)}; load the base model {WAY_OUT}"
        )
    dtype = dtype_beside(linear)
    is_sixteen_bit = dtype in (torch.float16, torch.bfloat16)
    return {"device": weight.device, "dtype": torch.float32 if is_sixteen_bit else dtype}


def expert_targets(parts: Parts) -> tuple[str, ...]:
    """The Linears of a layer that AdaMix replaces."""
    if parts.mixture is None:
        return ()
    return ("ffn_out",) if parts.mixture.kind == "adapter" else parts.mixture.targets
