"""Inputs of one call that every layer may read: labels of the batch's samples (attributes, tasks).

A layer is computed again where it is checkpointed, after the call has ended, so what it read then
has to travel with the checkpoint; and a beam search gives the decoder a multiple of the samples.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..nn.packing import Packing

PAYS_UP_TO = 0.95  # tokens of a batch that are no padding: copying them takes some hundredths
CHECKPOINT = "_gradient_checkpointing_func"  # transformers' name for it, on a layer


class Call(threading.local):
    """What the present call of the model gives its layers; each thread has calls of its own.

    Attributes:
        labels: int64 [B] by name.
        gates: those of this forward, with gradients; None where nothing is made of them.
        packs: whether tokens may be packed.
        packed: the mask of this forward and the packing by it, which its layers share; or None.
    """

    def __init__(self) -> None:
        self.labels: Mapping[str, Tensor] = {}
        self.gates: list[Tensor] | None = None
        self.packs = True
        self.packed: tuple[Tensor, Packing | None] | None = None

    @contextmanager
    def given(self, labels: Mapping[str, Tensor]) -> Iterator[None]:
        """Inside, the layers read these labels."""
        before, self.labels = self.labels, labels
        try:
            yield
        finally:
            self.labels = before

    @contextmanager
    def gathering(self) -> Iterator[list[Tensor]]:
        """Inside, which is one forward, the layers add their gates to a list."""
        gates: list[Tensor] = []
        self.gates = gates
        try:
            yield gates
        finally:
            self.gates = None

    @contextmanager
    def unpacked(self) -> Iterator[None]:
        """Inside, the layers compute padding, too."""
        before, self.packs = self.packs, False
        try:
            yield
        finally:
            self.packs = before

    def packing_by(self, mask: Tensor) -> Packing | None:
        """The packing of this forward's tokens by its mask [B, S], where one pays."""
        if not self.packs:
            return None
        if self.packed is None or self.packed[0] is not mask:
            packing = Packing.of(mask)
            pays = packing is not None and packing.share <= PAYS_UP_TO
            self.packed = mask, packing if pays else None
        return self.packed[1]

    def label(self, name: str, batch: int) -> Tensor:
        """The labels [batch] of a name. Where the batch is a multiple of the call's samples, as in
        a beam search, each sample's rows stand together: ``repeat_interleave``.

        Raises:
            ValueError: there are none, or the batch is no multiple of them.
        """
        if name not in self.labels:
            raise ValueError(
                f"PeltModel: expected {name!r} among the inputs of this call, got "
                f"{', '.join(self.labels) or 'none'}; call the PeltModel, not its base_model"
            )
        given = self.labels[name]
        samples = given.shape[0]
        if batch == samples:
            return given
        if not samples or batch % samples:
            raise ValueError(
                f"PeltModel: expected a batch of {samples} samples as {name!r} has labels, or a "
                f"multiple (beams), got {batch}"
            )
        return given.repeat_interleave(batch // samples)

    def __deepcopy__(self, memo: dict[int, Any]) -> Call:
        return Call()

    def __reduce__(self) -> tuple[type[Call], tuple[()]]:
        return Call, ()


class CarriesCall:
    """A checkpoint function that gives a layer that is computed again the labels of its call."""

    def __init__(self, checkpoint: Callable[..., Any], call: Call) -> None:
        self.checkpoint, self.call = checkpoint, call

    @property
    def keywords(self) -> Mapping[str, Any]:
        """The options of the checkpoint function, as functools.partial gives them."""
        return getattr(self.checkpoint, "keywords", {})

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        labels = self.call.labels

        def with_labels(*inner: Any) -> Any:
            with self.call.given(labels):
                return function(*inner)

        return self.checkpoint(with_labels, *args)


def carry(layers: nn.ModuleList, call: Call) -> None:
    """Lets the checkpoints of these layers carry the labels. Checkpointing may be switched on at
    any time, so this is asked at each forward.
    """
    for layer in layers:
        checkpoint = layer.__dict__.get(CHECKPOINT)
        if checkpoint is not None and not isinstance(checkpoint, CarriesCall):
            setattr(layer, CHECKPOINT, CarriesCall(checkpoint, call))


def carry_no_more(layers: nn.ModuleList) -> None:
    """Gives the layers their own checkpoint functions back."""
    for layer in layers:
        checkpoint = layer.__dict__.get(CHECKPOINT)
        if isinstance(checkpoint, CarriesCall):
            setattr(layer, CHECKPOINT, checkpoint.checkpoint)
