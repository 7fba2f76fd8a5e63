"""What of a model with gates works for a text: the parameters of parts whose gate is not below a
threshold, and what they and the frozen layers multiply.

    parameters      Σ_parts [g >= t] n,  beside what always works: gates, heads, parts without gate
    FLOPs of S tokens, two for each multiply-add:
      a Linear       2 S Din Dout          frozen
      an attention   4 S² H E              frozen: scores, and their product with the values
      an adapter     4 S D R               [g >= t]
      a LoRA branch  2 S R (Din + Dout)    [g >= t]
      a prefix       4 S P H E             [g >= t], of P keys more in the attention
      a gate         2 S Din               always, as it has to be known

Norms, activations, softmaxes and sums are left out, as `torch.utils.flop_counter` leaves them out,
and so is what stands before and behind the layers. What is made once for a batch is no text's: a
prefix's network, which `PeltModel.collapse_prefix` takes away, and PST's weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..nn import (
    ExpertAdapter,
    ExpertLoRALinear,
    ExpertLowRank,
    GatedAdapter,
    LoRALinear,
    LowRank,
    PrefixAttention,
)
from ..nn.original import sizes_of
from .layer import AdaptedFusedLinear, AdaptedLinear, AdaptedNorm, gate_kind
from .stack import Stack

if TYPE_CHECKING:
    from .inject import Injection

Gate = tuple[int, str]  # the layer and the kind, as `PeltModel.gate_values` has them


@dataclass(frozen=True)
class Active:
    """What works for each of n texts.

    Attributes:
        threshold: t; None: every part works.
        parameters: [n], of the stored ones (`PeltModel.get_nb_stored_parameters`) those that work
            for a text: all of a part with g >= t and none of one below, of a prefix its keys and
            values in that layer. Of prefixes that a text's attributes choose its own count.
        parts: [n], the share of the gated parts of all layers that work.
        added_flops, base_flops: [n], of what the method adds to the layers, and of the layers
            without it; float64.
    """

    threshold: float | None
    parameters: Tensor
    parts: Tensor
    added_flops: Tensor
    base_flops: Tensor

    def means(self) -> dict[str, float | None]:
        """The means over the texts, for JSON; ``flops_share``: of all added FLOPs in those of the
        layers without the method.
        """
        figures = ("parameters", "parts", "added_flops", "base_flops")
        found = {name: getattr(self, name).double().mean().item() for name in figures}
        share = found["added_flops"] / found["base_flops"]
        return {"threshold": self.threshold, **found, "flops_share": share}


class Part(NamedTuple):
    """A part of one layer.

    Attributes:
        gate: which scales it; None: it always works.
        stored, read: how many numbers are stored of it, and how many of them a text is given.
        flops: for a token.
    """

    gate: Gate | None
    stored: int
    read: int
    flops: int


def count_active(
    injection: Injection,
    stored: int,
    gates: Mapping[Gate, Tensor],
    lengths: Tensor,
    threshold: float | None,
) -> Active:
    """What works for texts of these lengths [n] with these gates [n]; stored: all stored numbers.

    Raises:
        ValueError: why it cannot be counted, or gates or lengths that do not belong to n texts.
    """
    reason = why_not_countable(injection)
    if reason:
        raise ValueError(f"count_active: {reason}")
    if lengths.ndim != 1 or not len(lengths) or (lengths < 1).any():
        raise ValueError(
            "count_active: expected lengths as a number >= 1 for each text, got "
            f"{list(lengths.shape)}"
        )
    lengths = lengths.double().cpu()
    parts = list(_parts(injection))
    always, gated = [p for p in parts if p.gate is None], [p for p in parts if p.gate is not None]
    works = _works([part.gate for part in gated], gates, len(lengths), threshold)
    rest = stored - sum(part.stored for part in parts) + sum(part.read for part in always)
    read = torch.tensor([part.read for part in gated], dtype=torch.long)
    flops = torch.tensor([part.flops for part in gated], dtype=torch.float64)
    for_token = works.double() @ flops + sum(part.flops for part in always)
    frozen, attention = _base(injection)
    return Active(
        threshold,
        rest + (works.long() * read).sum(1),
        works.double().mean(1),
        lengths * for_token,
        lengths * frozen + lengths**2 * attention,
    )


def why_not_countable(injection: Injection) -> str:
    """Why the gates of a model are none of a whole text in one place, or nothing."""
    if not injection.parts.gated:
        return "expected a method with gates, got one without any"
    if any(stack.is_causal for stack in injection.stacks):
        return (
            "expected an encoder, whose gates are one for each text, got a model with a decoder, "
            "where each token has its own"
        )
    layers, depth = len(injection.states), _depth(injection)
    if layers != depth:
        return (
            f"expected layers with weights of their own, got {layers} of {depth} that are used "
            "again and whose gates are those of their last use"
        )
    return ""


def _depth(injection: Injection) -> int:
    config: Any = injection.model.config
    return int(getattr(config, "num_hidden_layers", len(injection.states)))


def _works(
    names: list[Gate | None], gates: Mapping[Gate, Tensor], count: int, threshold: float | None
) -> Tensor:
    """Which parts work for each text, [n, parts] bool."""
    columns = []
    for name in names:
        value = gates.get(name) if name is not None else None
        if value is None or value.shape != (count,):
            got = "none" if value is None else str(list(value.shape))
            raise ValueError(
                f"count_active: expected the gate {name} of {count} texts, [{count}] as "
                f"gate_values has it, got {got}"
            )
        columns.append(value.cpu() >= (0.0 if threshold is None else threshold))
    return torch.stack(columns, dim=1)


def _parts(injection: Injection) -> Iterator[Part]:
    """The parts of all layers, and their gates, which are parts that always work."""
    for stack in injection.stacks:
        for place, (layer, state) in enumerate(zip(stack.layers, stack.states, strict=True)):
            for module in layer.modules():
                yield from _of_module(module, state.number)
            for own in stack.prefixes[place].values():
                if isinstance(own.prefixes, PrefixAttention):
                    gate = None if own.gate is None else (state.number, own.kind)
                    yield _of_prefix(own.prefixes, gate, _heads(stack, layer))


def _of_prefix(prefixes: PrefixAttention, gate: Gate | None, heads: int) -> Part:
    """That of one layer; heads is H E of its queries."""
    numbers = 2 * prefixes.num_heads * prefixes.head_size
    stored = prefixes.collapsed_numbers // prefixes.num_layers
    return Part(gate, stored, numbers * prefixes.columns, 4 * prefixes.columns * heads)


def _of_module(module: nn.Module, layer: int) -> Iterator[Part]:
    """The parts that a stand-in brings into a layer."""
    if isinstance(module, (AdaptedNorm, AdaptedLinear)) and module.adapter is not None:
        yield from _of_adapter(module.adapter, (layer, "adapter"))
    if isinstance(module, AdaptedLinear) and module.r:
        gate = None if module.gate is None else (layer, gate_kind("", module.target))
        yield from _of_branch(module, gate)
    elif isinstance(module, AdaptedFusedLinear):
        for name, branch in module.branches.items():
            assert isinstance(branch, (LowRank, ExpertLowRank))
            gate = None if branch.gate is None else (layer, gate_kind(name))
            yield from _of_branch(branch, gate)
    elif isinstance(module, ExpertLoRALinear):
        yield from _of_branch(module, None)
    elif isinstance(module, ExpertAdapter):
        yield _of_matrices(None, *(bank[0] for bank in module.banks().values()))
    if isinstance(module, (AdaptedLinear, AdaptedFusedLinear)):
        for extra in module.extra_gates.values():
            yield _of_matrices(None, *extra.parameters())


def _of_adapter(adapter: GatedAdapter, gate: Gate) -> Iterator[Part]:
    own = None if adapter.gate is None else gate
    yield _of_matrices(own, adapter.w_down, adapter.b_down, adapter.w_up, adapter.b_up)
    if adapter.gate is not None:
        yield _of_matrices(None, *adapter.gate.parameters())


def _of_branch(
    branch: LoRALinear | LowRank | ExpertLowRank | ExpertLoRALinear, gate: Gate | None
) -> Iterator[Part]:
    a: Tensor = branch.lora_a
    b: Tensor = branch.lora_b
    if isinstance(branch, (ExpertLowRank, ExpertLoRALinear)):
        a, b = a[0], b[0]
    yield _of_matrices(gate, a, b)
    own = getattr(branch, "gate", None)
    if own is not None:
        yield _of_matrices(None, *own.parameters())


def _of_matrices(gate: Gate | None, *parameters: Tensor) -> Part:
    """A part of matrices by which each token is multiplied once, their biases, and a gate's weight,
    whose bias alone has one entry.
    """
    count = sum(parameter.numel() for parameter in parameters)
    is_gate = all(parameter.ndim == 1 for parameter in parameters)
    products = [p.numel() for p in parameters if p.ndim == 2 or (is_gate and p.numel() > 1)]
    return Part(gate, count, count, 2 * sum(products))


def _base(injection: Injection) -> tuple[int, int]:
    """FLOPs of the layers without the method: for a token, and for a pair of tokens."""
    for_token = for_pair = 0
    for stack in injection.stacks:
        for layer in stack.layers:
            for module in layer.modules():
                if _is_linear(module):
                    into, out = _sizes(module)
                    for_token += 2 * into * out
            for_pair += 4 * _heads(stack, layer)
    return for_token, for_pair


def _is_linear(module: nn.Module) -> bool:
    """Whether it is a Linear, or stands for one: those have a weight of two dimensions."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def _sizes(linear: nn.Module) -> tuple[int, int]:
    """Din and Dout; a stand-in has them from the module that it stands for."""
    original = getattr(linear, "original", None)
    return sizes_of(linear if original is None else original.module)


def _heads(stack: Stack, layer: nn.Module) -> int:
    """H E, the columns of an attention's queries."""
    place = dict(stack.slots.places("query"))["query"]
    return _sizes(layer.get_submodule(place.path))[1] // place.parts
