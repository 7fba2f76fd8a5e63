"""What a task is made of: examples, labels and three parts that share no text."""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UsageError
from .conditions import NO_CONDITIONS, Conditions
from .example import Example

# Parts that a run holds out of a file by itself: a tenth of it, and no more than this, because dev
# is read every epoch.
LARGEST_DEV = 500
LARGEST_TEST = 1000


@dataclass(frozen=True)
class Task:
    """A task with its three parts.

    `train` is the pool from which a run draws its training examples, `dev` serves early stopping
    and the choice of a learning rate, `test` is read once, at the end. `sources` says in words
    where each part comes from, `problem` what the labels are (`labels.PROBLEMS`); scores and texts
    have no `labels`. `conditions` holds the labels of attributes and the names of tasks.
    """

    name: str
    labels: tuple[str, ...]
    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...]
    sources: dict[str, str]
    problem: str = "classification"
    label_separator: str = ","
    conditions: Conditions = NO_CONDITIONS

    @property
    def has_pairs(self) -> bool:
        return self.train[0].pair is not None

    @property
    def fingerprint(self) -> str:
        """A digest of the labels in their order and all three parts: equal digests mean equal
        data and equal class numbers.
        """
        digest = hashlib.sha256(repr(self.labels).encode())
        if self.conditions != NO_CONDITIONS:
            digest.update(repr(self.conditions).encode())
        for part in (self.train, self.dev, self.test):
            for example in part:
                more = (example.attributes, example.task) if self.conditions else ()
                digest.update(repr((*example.content, example.label, *more)).encode())
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


def hold_out(
    examples: Sequence[Example],
    classes: Sequence[str],
    count: int,
    *,
    salt: str,
    whole_texts: bool = False,
) -> tuple[list[Example], list[Example]]:
    """Up to `count` examples, each class by its share, and the rest of them; `classes` holds that
    of each example.

    Chosen by the rows and `salt` alone. No text stands on both sides, and no class is held out
    whole: the last text of a class stays in the rest. With `whole_texts` the rows of one text are
    taken one after the other, so that where texts have many rows few of them are held out.
    """
    shares_left = _shares(Counter(classes), count)
    labels_of: dict[tuple[str, str | None], set[str]] = defaultdict(set)
    for example, label in zip(examples, classes, strict=True):
        labels_of[example.content].add(label)
    texts_left = Counter(label for labels in labels_of.values() for label in labels)
    order = list(range(len(examples)))
    random.Random(salt).shuffle(order)
    if whole_texts:
        first: dict[tuple[str, str | None], int] = {}
        for place, index in enumerate(order):
            first.setdefault(examples[index].content, place)
        order.sort(key=lambda index: first[examples[index].content])
    held: list[int] = []
    contents: set[tuple[str, str | None]] = set()
    for index in order:
        example = examples[index]
        if not shares_left[classes[index]]:
            continue
        if example.content not in contents:
            labels = labels_of[example.content]
            if any(texts_left[label] == 1 for label in labels):
                continue
            texts_left.subtract(labels)
            contents.add(example.content)
        shares_left[classes[index]] -= 1
        held.append(index)
    kept = [example for example in examples if example.content not in contents]
    return [examples[index] for index in sorted(held)], kept


def held_out_size(total: int, largest: int) -> int:
    """A tenth of `total`, at least one and at most `largest`."""
    return max(1, min(largest, total // 10))


def shortened(names: Sequence[str], shown: int = 5) -> str:
    """Names for a sentence, the first of them where there are many."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def _shares(sizes: Counter[str], count: int) -> Counter[str]:
    """`count` shared out in proportion to the sizes: whole parts first, then one each to the
    largest remainders, the larger class first where they are equal.
    """
    total = sizes.total()
    shares = Counter({label: count * size // total for label, size in sizes.items()})
    by_remainder = sorted(
        sizes, key=lambda label: (-(count * sizes[label] % total), -sizes[label], label)
    )
    shares.update(by_remainder[: count - shares.total()])
    return shares
