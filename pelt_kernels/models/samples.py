"""The samples of a mixed batch: which adapter each has, and what stands for a module meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .layer_state import LayerPrefix, LayerState

Rows = slice | Tensor


class Samples:
    """Which adapter each sample of a call has, by name."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._groups: dict[tuple[int, torch.device], list[tuple[str, Rows]]] = {}

    def groups(self, x: Tensor) -> list[tuple[str, Rows]]:
        """The rows of x [B, ...] that each adapter has. Where x has a multiple of the samples, as
        in a beam search, each sample's rows stand together.

        Raises:
            ValueError: it has no multiple of them.
        """
        key = (x.shape[0], x.device)
        if key not in self._groups:
            self._groups[key] = list(self._grouped(*key))
        return self._groups[key]

    def _grouped(self, size: int, device: torch.device) -> Iterator[tuple[str, Rows]]:
        count = len(self.names)
        if not size or size % count:
            raise ValueError(
                f"PeltModel: expected a batch of {count} samples, one for each of adapter_names, "
                f"or a multiple (beams), got {size}"
            )
        times = size // count
        for name in dict.fromkeys(self.names):
            own = [i for i, each in enumerate(self.names) if each == name]
            rows = [i * times + k for i in own for k in range(times)]
            is_range = rows[-1] - rows[0] == len(rows) - 1  # a view, for which nothing is copied
            yield (
                name,
                slice(rows[0], rows[-1] + 1) if is_range else torch.tensor(rows, device=device),
            )

    def each(self, x: Tensor, call: Callable[[str, Rows], Tensor]) -> Tensor:
        """What ``call`` gives for the rows of each adapter, in the order of the batch."""
        groups = self.groups(x)
        parts = [call(name, rows) for name, rows in groups]
        if len(parts) == 1:
            return parts[0]
        y = parts[0].new_empty((x.shape[0], *parts[0].shape[1:]))
        for (_, rows), part in zip(groups, parts):
            y[rows] = part
        return y


class MixedModule(nn.Module):
    """Stands for a module of the base model: each sample's rows go through what its adapter has
    there, or through the module itself.

    It shows the module's own parameters and attributes; what the adapters have there is no child.
    """

    def __init__(
        self, original: nn.Module, members: Mapping[str, nn.Module], samples: Samples
    ) -> None:
        super().__init__()
        self.__dict__["original"] = original
        self.members, self.samples = dict(members), samples
        self._parameters.update(original._parameters)
        self.train(original.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)

    def forward(self, x: Tensor) -> Tensor:
        """y [B, ...] of x [B, ...]."""

        def through(name: str, rows: Rows) -> Tensor:
            y: Tensor = self.members.get(name, self.__dict__["original"])(x[rows])
            return y

        return self.samples.each(x, through)


class MixedState:
    """Stands for a layer's state: each adapter's state is left its own samples' rows.

    Attributes:
        states: of this layer, by adapter.
        prefixes: of this attention, by adapter.
    """

    def __init__(
        self,
        samples: Samples,
        states: Mapping[str, LayerState],
        prefixes: Mapping[str, LayerPrefix],
    ) -> None:
        self.samples, self.states, self.prefixes = samples, states, prefixes

    def leave_mask(self, mask: Tensor | None) -> None:
        """As `LayerState.leave_mask`, of the whole batch's mask."""
        if mask is None:
            for state in self.states.values():
                state.leave_mask(None)
            return
        for name, rows in self.samples.groups(mask):
            if name in self.states:
                self.states[name].leave_mask(mask[rows])

    def leave_ffn_input(self, x: Tensor) -> None:
        """As `LayerState.leave_ffn_input`, of the whole batch's rows."""
        for name, rows in self.samples.groups(x):
            if name in self.states:
                self.states[name].leave_ffn_input(x[rows])
