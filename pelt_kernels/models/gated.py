"""A model whose parts are gated: the gates of a forward, and what takes their place."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..methods import parts_of
from .weighted import WeightedModel


class GatedModel(WeightedModel):
    """What a `PeltModel` does about the gates of the active adapter."""

    def record_gates(self, enabled: bool = True) -> None:
        """Keeps the gates of the latest forward for `gate_values`, or stops. Off by default."""
        for state in self._injection.states:
            state.is_recording = enabled
            state.gate_values = {}

    def gate_values(self) -> dict[tuple[int, str], Tensor]:
        """The gates of the latest forward while `record_gates` was on: (layer, kind) -> [B], or
        [B, S] where each token has its own, float32, on the device; what a rule (`set_gate_rule`)
        made of them, where there is one.

        Kinds: ``adapter``, ``prefix``, ``lora_query``, ``lora_value`` and so on, as far as they are
        gated, and ``cross_prefix`` of an attention over an encoder. Nothing waits for the device
        and nothing accumulates: the next forward replaces the tensors.
        """
        return {
            (state.number, kind): value
            for state in self._injection.states
            for kind, value in state.gate_values.items()
        }

    def set_gate_rule(self, rule: Callable[[int, str, Tensor], Tensor] | None) -> None:
        """Has a function decide the gates of every forward from here on; None: they are what they
        are.

        ``rule(layer, kind, gate)`` is called for each gate in each forward, with its layer and kind
        as `gate_values` has them and the value that it would have, [B] or [B, S]. What it returns,
        of the same shape, dtype and device, takes the gate's place, and gradients flow through it::

            def without_adapters(layer, kind, gate):
                return torch.zeros_like(gate) if kind == "adapter" else gate

            model.set_gate_rule(without_adapters)

        With a gate of 0 an adapter and a LoRA branch are as if they were not there. A prefix is
        not: its keys are zeros then, which still have their share of the softmax.

        Gates are then computed before the kernels instead of in them, on one more read of their
        input. The rule belongs to the active adapter, as its gates do; where samples of a batch
        have adapters of their own (``adapter_names``) it is given those of its adapter's samples.
        No file holds it.

        Raises:
            ValueError: the method has no gates; in a forward, the rule returns something else than
                such a gate. TypeError: rule cannot be called.
        """
        if rule is not None and not callable(rule):
            raise TypeError(
                "set_gate_rule: expected a function of a layer's number, a kind and a gate, or "
                f"None, got {type(rule).__name__}"
            )
        if rule is not None and not parts_of(self.method_config).gated:
            raise ValueError(
                "set_gate_rule: expected a method with gates, such as UniPELTConfig.apl(), got "
                f"{self.method_config.method!r} without any"
            )
        for state in self._injection.states:
            state.rule = rule
