"""The adapters and prefixes of all layers of a model with HyperPELT: written anew, or stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .hypernetwork import (
    AdapterWeights,
    HyperNetwork,
    PrefixWeights,
    StackSizes,
    TaskEmbeddings,
)

Weights = TypeVar("Weights", AdapterWeights, PrefixWeights)


class HyperCall(NamedTuple):
    """The tasks of one call of a model: n entries, and which of them each sample has.

    With features [n, C, F] of images an entry is a sample. Repeating samples, as beams do, repeats
    `index` only.
    """

    entries: Tensor  # int64 [n]
    index: Tensor  # type: ignore[assignment]  # int64 [B]; tuple.index is not needed here
    features: Tensor | None = None

    @classmethod
    def of(cls, tasks: Tensor, features: Tensor | None = None) -> HyperCall:
        """The call of samples with tasks int64 [B] and, maybe, features [B, C, F].

        On a GPU the entries are not made unique, which would stop the stream: a batch of more
        samples than tasks is better told by its unique entries.
        """
        if features is not None or tasks.is_cuda:
            return cls(tasks, torch.arange(tasks.shape[0], device=tasks.device), features)
        return cls(*tasks.unique(return_inverse=True))


class GeneratedWeights(nn.Module):
    """What hypernetworks, one for each stack of layers, write from the embeddings of tasks.

    Each layer asks for its own weights where it uses them, so that gradient checkpointing keeps
    none of them. Within `keeping`, as while a text is generated, weights of tasks without images
    are written once for all tasks and kept; not beyond it, as a parameter may be written to in
    ways that nothing tells.
    """

    # Of the `keeping` that is going on; not part of a copy.
    _kept: dict[tuple[str, int, int], Any] | None = None

    def __init__(self, tasks: TaskEmbeddings, stacks: Mapping[str, HyperNetwork]) -> None:
        super().__init__()
        self.tasks, self.stacks = tasks, nn.ModuleDict(dict(stacks))

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Inside, what is written without gradients is kept: no parameter changes meanwhile."""
        self._kept = {}
        try:
            yield
        finally:
            self._kept = None

    def adapter(
        self, stack: str, layer: int, call: HyperCall
    ) -> tuple[AdapterWeights, Tensor | None]:
        """The bank of adapters beside a layer's FFN, and the index [B] into it."""
        network = self._network(stack)
        return self._of(
            (stack, layer, -1),
            call,
            lambda entries, features: network.adapter(layer, self.tasks(entries, features)),
        )

    def prefix(
        self, stack: str, layer: int, block: int, call: HyperCall
    ) -> tuple[PrefixWeights, Tensor | None]:
        """The tables of an attention's prefixes, and the index [B] into them."""
        network = self._network(stack)
        return self._of(
            (stack, layer, block),
            call,
            lambda entries, features: network.prefix(layer, block, self.tasks(entries, features)),
        )

    @torch.no_grad()
    def stored(self, task: int) -> StoredWeights:
        """One task's weights as they are written now, as parameters of their own."""
        entries = torch.tensor([task], device=self.tasks.adapter.device)
        call = HyperCall(entries, torch.zeros_like(entries))
        first = next(iter(self.stacks))
        network = self._network(first)
        made = StoredWeights(
            {name: self._network(name).stack for name in self.stacks},
            prefix_length=network.prefix_length,
            bottleneck=network.bottleneck,
            device=entries.device,
            dtype=self.tasks.adapter.dtype,
        )
        for name, stack in made.stacks.items():
            assert isinstance(stack, StoredStack)
            for layer in range(stack.sizes.num_layers):
                if network.bottleneck:
                    stack.put_adapter(layer, self.adapter(name, layer, call)[0])
                for block in range(stack.sizes.attention_blocks if network.prefix_length else 0):
                    stack.put_prefix(layer, block, self.prefix(name, layer, block, call)[0])
        return made

    def _of(
        self,
        key: tuple[str, int, int],
        call: HyperCall,
        write: Callable[[Tensor, Tensor | None], Weights],
    ) -> tuple[Weights, Tensor | None]:
        kept = self._kept
        # Where the whole batch has one entry, nothing is to be chosen for each sample.
        is_one = call.entries.shape[0] == 1
        if kept is None or call.features is not None or torch.is_grad_enabled():
            weights = write(call.entries, call.features)
            return (weights.only(), None) if is_one else (weights, call.index)
        if key not in kept:
            all_tasks = torch.arange(self.tasks.adapter.shape[0], device=call.entries.device)
            kept[key] = write(all_tasks, None)
        if is_one:
            return kept[key].chosen(call.entries).only(), None
        return kept[key], call.entries[call.index]

    def _network(self, stack: str) -> HyperNetwork:
        network = self.stacks[stack]
        assert isinstance(network, HyperNetwork)
        return network

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_kept"}


class StoredStack(nn.Module):
    """One adapter for each layer of a stack and one prefix for each of its attentions, as
    parameters: what a hypernetwork wrote for one task.
    """

    def __init__(
        self, sizes: StackSizes, prefix_length: int, bottleneck: int, **placement: Any
    ) -> None:
        super().__init__()
        self.sizes = sizes
        num_layers, d, blocks, heads, head_size = sizes
        r = bottleneck
        shapes: dict[str, tuple[int, ...]] = {}
        if bottleneck:
            shapes = {"w_down": (r, d), "b_down": (r,), "w_up": (d, r), "b_up": (d,)}
            shapes |= {"norm_weight": (d,), "norm_bias": (d,), "scale": ()}
        if prefix_length:
            table = (blocks, prefix_length, heads, head_size)
            shapes |= {"keys": table, "values": table}
        for name, shape in shapes.items():
            value = torch.zeros(num_layers, *shape, **placement)
            self.register_parameter(name, nn.Parameter(value))

    def adapter(self, layer: int) -> AdapterWeights:
        """One layer's adapter."""
        return AdapterWeights(*(getattr(self, name)[layer] for name in AdapterWeights._fields))

    def prefix(self, layer: int, block: int) -> PrefixWeights:
        """One attention's prefix."""
        return PrefixWeights(
            self.get_parameter("keys")[layer, block], self.get_parameter("values")[layer, block]
        )

    def put_adapter(self, layer: int, weights: AdapterWeights) -> None:
        """Copies an adapter in."""
        for name, value in weights._asdict().items():
            self.get_parameter(name)[layer].copy_(value)

    def put_prefix(self, layer: int, block: int, weights: PrefixWeights) -> None:
        """Copies a prefix in."""
        self.get_parameter("keys")[layer, block].copy_(weights.keys)
        self.get_parameter("values")[layer, block].copy_(weights.values)


class StoredWeights(nn.Module):
    """`GeneratedWeights` of one task without what wrote them: the same adapters and prefixes."""

    def __init__(
        self,
        sizes: Mapping[str, StackSizes],
        *,
        prefix_length: int,
        bottleneck: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.stacks = nn.ModuleDict(
            {
                name: StoredStack(stack, prefix_length, bottleneck, device=device, dtype=dtype)
                for name, stack in sizes.items()
            }
        )

    def adapter(
        self, stack: str, layer: int, call: HyperCall | None = None
    ) -> tuple[AdapterWeights, Tensor | None]:
        """The adapter beside a layer's FFN, and no index."""
        return self._stack(stack).adapter(layer), None

    def prefix(
        self, stack: str, layer: int, block: int, call: HyperCall | None = None
    ) -> tuple[PrefixWeights, Tensor | None]:
        """An attention's prefix, and no index."""
        return self._stack(stack).prefix(layer, block), None

    def _stack(self, name: str) -> StoredStack:
        stack = self.stacks[name]
        assert isinstance(stack, StoredStack)
        return stack
