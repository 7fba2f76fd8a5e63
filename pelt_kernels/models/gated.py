"""A model whose parts are gated: the gates of a forward, and what takes their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..methods import parts_of
from .active import Active, count_active, why_not_countable
from .several import SeveralAdapters


class GatedModel(SeveralAdapters):
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
        if rule is not None:
            self._check_gated("set_gate_rule")
        for state in self._injection.states:
            state.rule = rule

    @property
    def skip_below(self) -> float | None:
        """A part whose gate for a sentence is below this number does no work for that sentence (for
        a token, where each has its own gate). None, at first: every part works for all. A rule
        (`set_gate_rule`) is asked before.

        An adapter leaves its residual as it is, and a LoRA branch adds nothing: what a gate of 0
        gives. A prefix is taken out of the sentence's attention, which is not what a gate of 0
        gives: keys of zeros keep their share of the softmax, and computing that share is the work
        that is to be saved. So at the threshold a prefix's effect ends in a step, and a model is as
        good with a prefix skipped as it is without it.

        What a sentence gives does not depend on which others are in its batch. On a CPU the rows
        that skip an adapter are not computed, nor is a prefix's attention for sentences without it;
        a LoRA branch is left out where all rows skip it. On a GPU the host does not wait to see
        what can be left out: the adapter's kernel skips tiles of rows, a LoRA branch is multiplied
        by 0, and the attention is computed with and without the prefix, which costs more than it
        saves; under torch.compile that is so on a CPU, too.

        For inference: a forward or generate with it raises ValueError in training, and where a
        gradient could be wanted. It belongs to the active adapter, and no file holds it.
        """
        states = self._injection.states
        return states[0].skip_below if states else None

    @skip_below.setter
    def skip_below(self, threshold: float | None) -> None:
        if threshold is not None:
            is_number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
            if not is_number or not 0 <= threshold <= 1:
                raise ValueError(
                    "skip_below: expected a number from 0 to 1, as gates are, or None, got "
                    f"{threshold!r:.80}"
                )
            self._check_gated("skip_below")
        for state in self._injection.states:
            state.skip_below = threshold

    def count_active(
        self,
        gates: Mapping[tuple[int, str], Tensor],
        lengths: Tensor,
        threshold: float | None = None,
    ) -> Active:
        """What works for texts with these gates when `skip_below` is a threshold: the parameters of
        the parts that work, and their FLOPs beside the frozen layers', by formula::

            model.record_gates()
            model(**batch)
            found = model.count_active(model.gate_values(), batch["attention_mask"].sum(1), 0.1)
            print(found.means())

        Nothing runs, and the model does not change. It is what a text needs by itself: in a batch a
        LoRA branch works for all rows where it works for one, and a GPU computes more (see
        `skip_below`). Parts without a gate, the gates themselves and the head always count, and a
        prefix by its keys and values, whether it is collapsed or not.

        Args:
            gates: as `gate_values` gives them, [n] each.
            lengths: the real tokens of each text, [n].
            threshold: a part with a smaller gate does not work; None: all work.

        Raises:
            ValueError: a gate is missing or of another shape; a method without gates, a decoder,
                whose tokens have gates of their own, or layers that are used several times.
        """
        return count_active(
            self._injection, self.get_nb_stored_parameters(), gates, lengths, threshold
        )

    def why_not_countable(self) -> str:
        """Empty where `count_active` can serve, else the reason it cannot, as one clause."""
        return why_not_countable(self._injection)

    def _check_gated(self, who: str) -> None:
        """Raises ValueError for a method without gates."""
        if not parts_of(self.method_config).gated:
            raise ValueError(
                f"{who}: expected a method with gates, such as UniPELTConfig.apl(), got "
                f"{self.method_config.method!r} without any"
            )

    def _check_skipping(self) -> None:
        """Raises ValueError for a call that is no inference of a model that skips parts."""
        if self.skip_below is None:
            return
        wants_grad = torch.is_grad_enabled() and any(
            parameter.requires_grad for parameter in self.trained_parameters().values()
        )
        if self.base_model.training or wants_grad:
            got = "one in training" if self.base_model.training else "one that keeps gradients"
            raise ValueError(
                f"PeltModel: expected skip_below={self.skip_below:g} in inference, by a model in "
                f"evaluation under torch.no_grad(), got {got}; set skip_below to None to train"
            )
