"""What happens around a stack of layers: a forward that begins inside another one is kept
apart from it, and checkpointed layers are given an input that requires a gradient.
"""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch
from torch import Tensor, nn

from .call import Call, carry
from .layer_state import InFlight, LayerState

# Attributes under which the encoder and its embeddings hold what the hooks need.
FORWARDS_ATTRIBUTE = "_pelt_forwards"
STACK_ATTRIBUTE = "_pelt_stack"


class StackNotes:
    """What the hook of the embeddings needs: the layers that follow, and the model's calls."""

    def __init__(self, layers: nn.ModuleList, call: Call) -> None:
        self.layers, self.call = layers, call


class Forwards(threading.local):
    """Keeps a forward that begins inside another one, in a hook of one of its modules, apart from
    it: what is in flight in the layers waits until the inner forward has ended.
    """

    def __init__(self, states: list[LayerState]) -> None:
        self.states = states
        self.waiting: list[list[tuple[InFlight, dict[str, Any]]]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Forwards:
        return Forwards(copy.deepcopy(self.states, memo))

    def __reduce__(self) -> tuple[type[Forwards], tuple[list[LayerState]]]:
        return Forwards, (self.states,)


def begin_forward(encoder: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of the encoder: lets what is in flight wait."""
    if torch.compiler.is_compiling():
        return
    forwards: Forwards = getattr(encoder, FORWARDS_ATTRIBUTE)
    if forwards.states:  # which share their call
        forwards.states[0].call.packed = None  # of an earlier mask, which may be refilled by now
    waiting = []
    for state in forwards.states:
        flight = state.in_flight
        # Spelled out, as nearly every forward finds nothing here.
        if (
            flight.mask is not None
            or flight.prefix_gate is not None
            or flight.ffn_input is not None
            or flight.packing is not None
        ):
            waiting.append((flight, vars(flight).copy()))
            flight.clear()
    forwards.waiting.append(waiting)


def end_forward(encoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of the encoder, called after an error too: what waited goes on."""
    if torch.compiler.is_compiling():
        return
    for in_flight, values in getattr(encoder, FORWARDS_ATTRIBUTE).waiting.pop():
        vars(in_flight).update(values)


def start_gradient(embeddings: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook of the embeddings. Reentrant checkpointing passes no gradient to the parameters
    of a layer none of whose inputs requires one, and the output of frozen embeddings does not. And
    what the call gives its layers travels with their checkpoints.
    """
    notes: StackNotes = getattr(embeddings, STACK_ATTRIBUTE)
    if notes.call.labels:
        carry(notes.layers, notes.call)
    first = notes.layers[0]
    is_checkpointed = getattr(first, "gradient_checkpointing", False) and first.training
    if is_checkpointed and torch.is_grad_enabled() and not output.requires_grad:
        output.requires_grad_(True)
    return output
