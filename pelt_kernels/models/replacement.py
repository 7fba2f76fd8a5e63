"""Which modules of a layer give way to which: the stand-ins of every part, and whether they may."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..methods import Parts
from ..methods.lora import TARGETS
from ..nn import ExpertAdapter, ExpertLoRALinear, GatedAdapter, PrunedLinear
from ..nn.original import NAMES, why_not_replaceable
from .layer import (
    PREFIX_GATE,
    AdaptedLinear,
    AdaptedNorm,
    ExpertLinear,
    LayerPrefix,
    LayerState,
)
from .slots import Slots

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
    """

    slots: Slots
    parts: Parts
    placement: dict[str, Any]

    def in_layer(
        self, layer: nn.Module, state: LayerState, prefix: LayerPrefix | None
    ) -> Iterator[Replacement]:
        """The replacements of one layer."""
        for path, adapted in self._by_path(layer, state, prefix):
            parent, _, name = path.rpartition(".")
            original = layer.get_submodule(path)
            yield Replacement(layer.get_submodule(parent), name, original, adapted)

    def _by_path(
        self, layer: nn.Module, state: LayerState, prefix: LayerPrefix | None
    ) -> Iterator[tuple[str, nn.Module]]:
        """Part by part: in this order they draw their starting values."""
        slots, parts = self.slots, self.parts
        for target in TARGETS:
            path = slots.linear(target)
            has_branch = parts.lora is not None and target in parts.lora.targets
            has_gate = target == "query" and prefix is not None and prefix.is_gated
            if has_branch or has_gate:
                base = layer.get_submodule(path)
                yield path, self._linear(base, target, state, has_branch, has_gate)
        if parts.adapter is not None:
            yield slots.ffn_norm, self._norm(layer.get_submodule(slots.ffn_norm), state)
        for target in parts.pruning.targets if parts.pruning is not None else ():
            path = slots.linear(target)
            yield path, self._pruned(layer.get_submodule(path))
        for target in _expert_targets(parts):
            path = slots.linear(target)
            yield path, self._experts(layer.get_submodule(path))

    def _linear(
        self, base: Any, target: str, state: LayerState, has_branch: bool, has_gate: bool
    ) -> AdaptedLinear:
        """A Linear with a LoRA branch, or, as the query's, with the prefix's gate, or with both."""
        lora, prefix = self.parts.lora, self.parts.prefix
        return AdaptedLinear(
            base,
            lora.r if lora and has_branch else 0,
            lora.alpha if lora else 1.0,
            dropout=lora.dropout if lora else 0.0,
            gate_pooling=lora.gate_pooling if lora and lora.gated else None,
            extra_gates={PREFIX_GATE: prefix.gate_pooling} if prefix and has_gate else {},
            dtype=self.placement["dtype"],
            state=state,
            target=target,
        )

    def _norm(self, base: Any, state: LayerState) -> AdaptedNorm:
        adapter = self.parts.adapter
        assert adapter is not None
        hidden_size = base.normalized_shape[0]
        module = GatedAdapter(
            hidden_size,
            adapter.bottleneck_of(hidden_size),
            activation=adapter.activation,
            gate_pooling=adapter.gate_pooling if adapter.gated else None,
            dropout=adapter.dropout,
            scale=adapter.scale,
            start=adapter.start,
            **self.placement,
        )
        return AdaptedNorm(base, module, state, self.parts.has_parallel_adapter)

    def _pruned(self, base: Any) -> PrunedLinear:
        pst = self.parts.pruning
        assert pst is not None
        return PrunedLinear(
            base,
            pst.r1,
            pst.r2,
            beta=pst.beta,
            alpha1=pst.alpha1,
            alpha2=pst.alpha2,
            dtype=self.placement["dtype"],
        )

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
        experts = ExpertAdapter(
            base.out_features,
            mixture.as_adapter().bottleneck_of(base.out_features),
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
        for path, kind in _places(slots, parts):
            module = layer.get_submodule(path)
            reason = why_not_replaceable(module, kind)
            if reason:
                raise ValueError(
                    f"get_pelt_model: expected {names[id(module)]} as an nn.{kind.__name__} with "
                    f"floating-point weight and bias, got {reason}"
                )


def _places(slots: Slots, parts: Parts) -> Iterator[tuple[str, type[nn.Module]]]:
    """The paths in a layer of what the parts replace, and what has to be there."""
    targets: list[str] = []
    if parts.lora is not None:
        targets += parts.lora.targets
    if parts.prefix is not None and parts.prefix.gated:
        targets.append("query")
    if parts.pruning is not None:
        targets += parts.pruning.targets
    targets += _expert_targets(parts)
    for target in targets:
        yield slots.linear(target), nn.Linear
    if parts.adapter is not None:
        yield slots.ffn_norm, nn.LayerNorm


def _expert_targets(parts: Parts) -> tuple[str, ...]:
    """The Linears of a layer that AdaMix replaces."""
    if parts.mixture is None:
        return ()
    return ("ffn_out",) if parts.mixture.kind == "adapter" else parts.mixture.targets
