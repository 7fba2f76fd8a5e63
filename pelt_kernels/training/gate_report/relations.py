"""Which traits of a text its gates relate to, by permutation tests that count how often was looked.

A gate's relation to a trait is the share of its variance that the trait explains: eta squared of
groups (labels, tasks), the square of Spearman's correlation of numbers (length, loss, confidence).
Whether such a share is more than chance is judged against the same rows with the trait dealt out
anew: for each of `PERMUTATIONS` deals the largest share among all gates is kept, and a gate's p is
how often that is as large as its own share (Westfall and Young 1993), times the number of traits
(Bonferroni). So with a probability of 95 % not one relation is found where there is none at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

PERMUTATIONS = 2000
SEED = 0
LEVEL = 0.05
_CHUNK_BYTES = 2**24  # of the deals that are looked at together


@dataclass(frozen=True)
class Trait:
    """Something that is known of each of n texts.

    Attributes:
        columns: [n, C], which give the share of a standardised gate g [n] by ``(columnsᵀ g)²``: its
            sum over C, or its largest.
        is_number: whether the gate's ranks are meant, and the share has a sign.
    """

    name: str
    statistic: str
    columns: np.ndarray
    is_number: bool = False
    takes_largest: bool = False

    @classmethod
    def of_groups(cls, name: str, codes: np.ndarray) -> Trait:
        """Of the number of each text's group, [n]."""
        members = codes[:, None] == np.unique(codes)
        sizes = members.sum(axis=0)
        return cls(name, "eta squared", members / np.sqrt(sizes * len(codes)))

    @classmethod
    def of_sets(cls, name: str, indicators: np.ndarray) -> Trait:
        """Of several groups that a text may be in or not, [n, C]: the one that explains most."""
        columns = _standardised(indicators.astype(float)) / len(indicators)
        return cls(name, "largest eta squared of a label", columns, takes_largest=True)

    @classmethod
    def of_numbers(cls, name: str, values: np.ndarray) -> Trait:
        """Of a number, [n]."""
        columns = _standardised(rankdata(values)[:, None]) / len(values)
        return cls(name, "Spearman's correlation", columns, is_number=True)

    def values(self, gates: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """The statistic [..., K] of standardised gates [n, K] and columns [..., C, n]."""
        products = columns @ gates
        if self.is_number:
            return products[..., 0, :]
        squares = products**2
        return squares.max(axis=-2) if self.takes_largest else squares.sum(axis=-2)


@dataclass(frozen=True)
class Relation:
    """How K gates relate to a trait: the statistic and the corrected p of each, [K]."""

    trait: Trait
    values: np.ndarray
    p: np.ndarray

    @property
    def is_found(self) -> np.ndarray:
        found: np.ndarray = self.p < LEVEL
        return found

    @property
    def shares(self) -> np.ndarray:
        """Of the variance that is explained."""
        return self.values**2 if self.trait.is_number else self.values


def relations(
    gates: np.ndarray,
    traits: Sequence[Trait],
    permutations: int = PERMUTATIONS,
    seed: int = SEED,
) -> list[Relation]:
    """How the gates [n, K] relate to each trait."""
    found = []
    for index, trait in enumerate(traits):
        draw = np.random.default_rng([seed, index])
        ready = _standardised(rankdata(gates, axis=0) if trait.is_number else gates)
        values = trait.values(ready, trait.columns.T)
        largest = _largest_by_chance(ready, trait, permutations, draw)
        reached = (largest[:, None] >= np.abs(values) * (1 - 1e-9)).sum(axis=0)
        p = (1 + reached) / (1 + permutations) * len(traits)
        found.append(Relation(trait, values, np.minimum(p, 1.0)))
    return found


def _largest_by_chance(
    gates: np.ndarray, trait: Trait, permutations: int, draw: np.random.Generator
) -> np.ndarray:
    """For each deal of the trait the largest statistic among all gates, [permutations]."""
    columns = trait.columns.T
    at_once = max(1, _CHUNK_BYTES // max(1, columns.nbytes))
    largest = []
    for start in range(0, permutations, at_once):
        count = min(at_once, permutations - start)
        dealt = np.stack([columns[:, draw.permutation(len(gates))] for _ in range(count)])
        largest.append(np.abs(trait.values(gates, dealt)).max(axis=-1))
    return np.concatenate(largest)


def _standardised(values: np.ndarray) -> np.ndarray:
    """Columns of mean 0 and variance 1; zeros for a column that is constant but for rounding."""
    centred = values - values.mean(axis=0)
    deviation = np.sqrt((centred**2).mean(axis=0))
    is_constant = deviation <= 1e-6 * np.abs(values).max(axis=0, initial=1e-30)
    scaled: np.ndarray = centred / np.where(is_constant, 1.0, deviation)
    return np.where(is_constant, 0.0, scaled)
