"""What a task is made of: examples, labels and three parts that share no text."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UsageError

# Parts that a run holds out of a file by itself: a tenth of it, and no more than this, because dev
# is read every epoch.
LARGEST_DEV = 500
LARGEST_TEST = 1000


@dataclass(frozen=True)
class Example:
    """One row: a text, perhaps a second one, and the label where it is known."""

    text: str
    pair: str | None
    label: str | None
    origin: str  # for messages: "row 17 of train.tsv"

    @property
    def content(self) -> tuple[str, str | None]:
        return self.text, self.pair


@dataclass(frozen=True)
class Task:
    """A classification task with its three parts.

    `train` is the pool from which a run draws its training examples, `dev` serves early stopping
    and the choice of a learning rate, `test` is read once, at the end. `sources` says in words
    where each part comes from.
    """

    name: str
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...]
    sources: dict[str, str]

    @property
    def has_pairs(self) -> bool:
        return self.train[0].pair is not None

    @property
    def fingerprint(self) -> str:
        """A digest of all three parts: equal digests mean equal data."""
        digest = hashlib.sha256()
        for part in (self.train, self.dev, self.test):
            for example in part:
                digest.update(repr((example.text, example.pair, example.label)).encode())
            digest.update(b"|")
        return digest.hexdigest()[:16]

    def draw_train(self, count: int | None, seed: int) -> list[Example]:
        """`count` training examples drawn by `seed`, or the whole pool."""
        if count is None:
            return list(self.train)
        if count > len(self.train):
            raise UsageError(
                f"train-examples: {count} were asked for but {self.name} leaves {len(self.train)} "
                f"after {len(self.dev)} for dev and {len(self.test)} for test"
            )
        return random.Random(f"draw {seed}").sample(list(self.train), count)


def label_order(labels: set[str]) -> tuple[str, ...]:
    """Labels in a fixed order: by number where all are integers, by letters otherwise."""
    if all(label.lstrip("-").isdigit() for label in labels):
        return tuple(sorted(labels, key=int))
    return tuple(sorted(labels))


def hold_out(
    examples: Sequence[Example], count: int, *, salt: str
) -> tuple[list[Example], list[Example]]:
    """`count` examples and the rest of them, chosen by `salt` alone; no text stands on both
    sides.
    """
    order = list(range(len(examples)))
    random.Random(salt).shuffle(order)
    held = [examples[index] for index in sorted(order[:count])]
    contents = {example.content for example in held}
    kept = [
        examples[index]
        for index in sorted(order[count:])
        if examples[index].content not in contents
    ]
    return held, kept


def held_out_size(total: int, largest: int) -> int:
    """A tenth of `total`, at least one and at most `largest`."""
    return max(1, min(largest, total // 10))
