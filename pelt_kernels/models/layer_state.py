"""What the modules of one layer leave for each other during a forward of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..nn import PrefixAttention, TaskAdapters
from ..nn.packing import Packing
from .call import Call

if TYPE_CHECKING:
    from .task_parts import WrittenAdapter, WrittenPrefix

# Attributes under which modules of the base model hold what a layer's steps need.
STATE_ATTRIBUTE = "_pelt_state"
PREFIX_ATTRIBUTE = "_pelt_prefix"

# A layer's number, a gate's kind and its value -> what takes the value's place.
Rule = Callable[[int, str, Tensor], Tensor]


class InFlight(threading.local):
    """What travels between the modules of one layer during one forward of that layer.

    It is written and read within a layer's forward, so the recomputation of a checkpointed layer
    writes its own, and it belongs to one thread, so a model that serves several threads (or is
    replicated over them) does not mix sentences.
    """

    def __init__(self) -> None:
        # No defaults in the class: torch.compile guards what the object holds, so a forward may not
        # leave more in it than it found.
        self.clear()

    def clear(self) -> None:
        """Nothing is in flight."""
        self.packing: Packing | None = None
        self.mask: Tensor | Packing | None = None
        self.prefix_gate: Tensor | None = None
        self.ffn_input: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> InFlight:
        return InFlight()

    def __reduce__(self) -> tuple[type[InFlight], tuple[()]]:
        return InFlight, ()


class LayerState:
    """What is known about one layer, hung on the modules of it that read or write it.

    Args:
        number: the layer's, from 0; a decoder's layers are counted on from its encoder's.
        needs_mask: whether a gate of this layer pools over real tokens only.
        call: what the present call of the model gives its layers.
        is_penalised: whether the loss of a training has a term of the gates.
    """

    def __init__(self, number: int, needs_mask: bool, call: Call, is_penalised: bool) -> None:
        self.number, self.needs_mask, self.call = number, needs_mask, call
        self.is_penalised = is_penalised
        self.in_flight = InFlight()
        self.is_recording = False
        self.rule: Rule | None = None
        self.skip_below: float | None = None
        self.gate_values: dict[str, Tensor] = {}
        self.task_adapters: TaskAdapters | None = None
        self.written_adapter: WrittenAdapter | None = None

    @property
    def mask(self) -> Tensor | Packing | None:
        """The padding mask [B, N] bool of this forward, where a gate needs it; or the packing of
        its tokens.
        """
        return self.in_flight.mask

    def leave_mask(self, mask: Tensor | None) -> None:
        """A layer begins: the mask, and no gate from a forward that was broken off."""
        packing = self.in_flight.packing
        self.in_flight.mask = (mask if packing is None else packing) if self.needs_mask else None
        self.in_flight.prefix_gate = None

    def take_mask(self) -> Tensor | Packing | None:
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

    def wants_values(self, is_training: bool) -> bool:
        """Whether gates are computed before the operators: a rule changes them, or a loss reads
        them. A checkpointed layer that is computed again has to do as its forward did, so it is not
        asked whether a loss is being made now.
        """
        return self.rule is not None or (self.is_penalised and is_training)

    def ruled(self, kind: str, value: Tensor) -> Tensor:
        """What the layer's rule makes of a gate, where there is one; and adds the gate to those of
        which the loss has a term.

        Raises:
            ValueError: it is no gate like the one that the rule was given; or it belongs to a loss
                and has no gradient.
        """
        if self.call.gates is not None:
            if not torch.is_grad_enabled():
                raise ValueError(
                    "UniPELTConfig: expected gradient checkpointing with use_reentrant=False for "
                    "gate_penalty, got a layer whose forward keeps no gradients"
                )
            self.call.gates.append(value)
        if self.rule is None:
            return value
        found = self.rule(self.number, kind, value)
        if not isinstance(found, Tensor) or _form(found) != _form(value):
            got = _form(found) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                "set_gate_rule: expected a rule that gives a gate like the one it takes, "
                f"{_form(value)} (layer {self.number}, {kind}), got {got}"
            )
        return found

    def record(self, kind: str, value: Tensor) -> None:
        """Keeps the latest value of a gate, on its device, without waiting for it."""
        if self.is_recording:
            self.gate_values[kind] = value.detach()


def _form(gate: Tensor) -> str:
    """A gate's dtype, shape and device."""
    return f"{gate.dtype} {list(gate.shape)} on {gate.device}"


@dataclass
class LayerPrefix:
    """Which prefix an attention has.

    Attributes:
        prefixes, row: the set of prefixes of this kind of attention, and the row that is its own.
        gate: None; ``pooled``, from what the query's Linear reads; or ``number``, a learned one of
            the layer: a prefix serves every query, so in a decoder nothing that its gate could be
            computed from is seen by all of them.
        kind: under which its gate's values are recorded.
        is_cross: whether the keys are those of an encoder.
    """

    prefixes: PrefixAttention | WrittenPrefix
    row: int
    gate: str | None
    kind: str = "prefix"
    is_cross: bool = False

    def labels(self, state: LayerState, query: Tensor) -> dict[str, Tensor] | None:
        """The labels [B] that choose among the prefixes of attributes, where there are any."""
        if not self.prefixes.attributes:
            return None
        return {name: state.call.label(name, query.shape[0]) for name in self.prefixes.attributes}
