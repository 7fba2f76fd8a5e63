"""What the gates are worth: the model with its gates altered, with a part removed, and without any.

    0, 0.5, 1   every gate of a kind has this value, for every text and in every layer
    own mean    each gate has the mean of its values: what is left is a scale for each layer
    shuffled    each text has the gates of another text
    removed     the part is not in the model; all else has its trained values

A gate of 0 removes an adapter or a branch of LoRA. It does not remove a prefix, whose keys become 0
and keep their share of the softmax. In a decoder, where each token has gates of its own, "own mean"
and "shuffled" also take out how they differ within a text: a text has one value there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...methods import HeadConfig, MethodConfig, Parts, parts_of
from ...models import PeltModel
from .measure import Outcome, Rows, Rule, RuleOfRows

ALL = "all gates"
OWN_MEAN, SHUFFLED, REMOVED, UNGATED = "own mean", "shuffled", "removed", "trained without gates"
CONSTANTS = {"0": 0.0, "0.5": 0.5, "1": 1.0}
PARTS = ("adapter", "prefix", "lora")
SHUFFLE_SEED = 2
_REST = "rest"  # the adapter without the part


@dataclass(frozen=True)
class Altered:
    """One alteration: of a kind of gates, all of them or a part; and what came of it."""

    of: str
    change: str
    outcome: Outcome


def alterations(
    model: PeltModel,
    rows: Rows,
    untouched: Outcome,
    advance: Callable[[int], None] = lambda count: None,
) -> Iterator[Altered]:
    """The model under each alteration, one after the other; it is left as it was."""
    kinds = list(dict.fromkeys(kind for _, kind in untouched.names))
    groups: dict[str, Sequence[str]] = {kind: [kind] for kind in kinds}
    if len(kinds) > 1:
        groups[ALL] = kinds
    for name, group in groups.items():
        for change, rule in _rules(group, untouched, rows).items():
            yield Altered(name, change, rows.outcome(model, rule, advance))
    for part in PARTS:
        if getattr(parts_of(model.method_config), part) is not None:
            with part_removed(model, part):
                yield Altered(part, REMOVED, rows.outcome(model, advance=advance))


def count_of(model: PeltModel, untouched: Outcome) -> int:
    """How many alterations there are."""
    kinds = len({kind for _, kind in untouched.names})
    parts = sum(getattr(parts_of(model.method_config), part) is not None for part in PARTS)
    return (kinds + (kinds > 1)) * (len(CONSTANTS) + 2) + parts


def _rules(kinds: Sequence[str], untouched: Outcome, rows: Rows) -> dict[str, RuleOfRows]:
    """The alterations of the gates of some kinds, by name."""
    values = torch.from_numpy(untouched.gates).to(rows.device, torch.float32)
    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(rows))
    dealt = values[torch.from_numpy(order).to(rows.device)]
    means = torch.from_numpy(untouched.gates.mean(axis=0)).to(values)
    places = {gate: place for place, gate in enumerate(untouched.names)}

    def constant(value: float) -> RuleOfRows:
        def rule(layer: int, kind: str, gate: Tensor) -> Tensor:
            return torch.full_like(gate, value) if kind in kinds else gate

        return lambda batch: rule

    def of_table(table: Tensor) -> RuleOfRows:
        """The gates of a table [n, K], a row for each text."""

        def of(batch: Tensor) -> Rule:
            chosen = table[batch]

            def rule(layer: int, kind: str, gate: Tensor) -> Tensor:
                place = places.get((layer, kind))
                if kind not in kinds or place is None:
                    return gate
                column = chosen[:, place].to(gate.dtype)
                return column.view(-1, *[1] * (gate.ndim - 1)).expand_as(gate).contiguous()

            return rule

        return of

    return {
        **{name: constant(value) for name, value in CONSTANTS.items()},
        OWN_MEAN: of_table(means.expand_as(values)),
        SHUFFLED: of_table(dealt),
    }


@contextmanager
def part_removed(model: PeltModel, part: str) -> Iterator[None]:
    """Inside, the model is one whose method lacks a part and whose other parameters have the values
    that they have.
    """
    values = {name: p.detach().clone() for name, p in model.trained_parameters().items()}
    active, was_training = model.active_adapter, model.training
    model.add_adapter(_REST, without_part(model.method_config, part))
    try:
        model.set_adapter(_REST)
        with torch.no_grad():
            for name, parameter in model.trained_parameters().items():
                parameter.copy_(values[name])
        model.set_progress(1.0)  # of pruning, which is done
        model.train(was_training)
        yield
    finally:
        model.set_adapter(active)
        model.delete_adapter(_REST)


def without_part(config: MethodConfig, part: str) -> MethodConfig:
    """The method that has a method's other parts; where there are none, the trained head alone."""
    if not hasattr(config, part):
        return HeadConfig()  # the part is the whole method
    tokens = getattr(config, "trainable_tokens", ())  # without those of a prefix
    absent: dict[str, Any] = {part: None}
    rest = parts_of(config)._replace(**absent)._replace(trainable_tokens=tokens)
    return HeadConfig() if rest == Parts() else replace(config, **absent)
