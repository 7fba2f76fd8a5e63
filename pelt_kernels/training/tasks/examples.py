"""What a task is made of: examples, labels and three parts that share no text."""

from __future__ import annotations

import hashlib
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ..errors import UsageError

# Parts that a run holds out of a file by itself: a tenth of it, and no more than this, because dev
# is read every epoch.
LARGEST_DEV = 500
LARGEST_TEST = 1000

# What files and data sets write for a label that is not known.
UNLABELLED = "-1"

_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,18}")
_NUMBER = re.compile(r"-?[0-9]{1,18}(\.[0-9]{1,18})?")


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
        """A digest of the labels in their order and all three parts: equal digests mean equal
        data and equal class numbers.
        """
        digest = hashlib.sha256(repr(self.labels).encode())
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


def label_order(labels: Collection[str]) -> tuple[str, ...]:
    """Labels in an order that depends on nothing but them: by number where all are whole numbers,
    by letters otherwise; equal numbers, such as 1 and 01, by letters.
    """
    if all(_WHOLE_NUMBER.fullmatch(label) for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))


def classes_of(examples: Sequence[Example], where: str) -> tuple[str, ...]:
    """The classes among the labels, in their order.

    UNLABELLED is none of them beside two whole numbers from 0 or more. Raises UsageError for fewer
    than two, for scores, and for one number written in two ways as 1 and 1.0.
    """
    origins: dict[str, str] = {}
    for example in examples:
        if example.label is not None:
            origins.setdefault(example.label, example.origin)
    labels = set(origins)
    others = labels - {UNLABELLED}
    is_counted = all(label[0] != "-" and _WHOLE_NUMBER.fullmatch(label) for label in others)
    if is_counted and len(others) != 1:
        labels = others
    for label in sorted(labels):
        whole, point, _ = label.partition(".")
        if point and whole in labels and _NUMBER.fullmatch(label) and float(label) == int(whole):
            raise UsageError(
                f"{origins[label]}: label {label} is the number {whole}, which is a label too; "
                "write them alike"
            )
    fractions = [label for label in labels if not _is_whole(label)]
    if fractions and all(_NUMBER.fullmatch(label) for label in labels):
        raise UsageError(
            f"{where}: expected classes as labels, got {len(labels)} numbers such as "
            f"{min(fractions)}; scores (regression) are not served, and numbers that are names of "
            "classes need a letter, such as s2.5"
        )
    if len(labels) < 2:
        only = f"only '{labels.pop()}'" if labels else "none"
        raise UsageError(f"{where}: expected at least two labels, got {only}")
    return label_order(labels)


def labelled(
    examples: Sequence[Example], labels: Sequence[str], where: str, say: Callable[[str], None]
) -> list[Example]:
    """The examples that have a label; reports how many have none. Raises UsageError at a label that
    is not among `labels`, and where no example is left.
    """
    known = [example for example in with_known_labels(examples, labels) if example.label]
    if not known:
        raise UsageError(f"{where}: expected labels, got none or {UNLABELLED} in every row")
    if len(known) < len(examples):
        say(
            f"{where}: {len(examples) - len(known)} of {len(examples)} rows are left out, having "
            f"no label ({UNLABELLED})"
        )
    return known


def with_known_labels(examples: Iterable[Example], labels: Sequence[str]) -> Iterator[Example]:
    """The examples with None for UNLABELLED where that is no class. Raises UsageError at the first
    other label that is not among `labels`.
    """
    classes = {*labels, None}
    for example in examples:
        if example.label == UNLABELLED and UNLABELLED not in classes:
            example = replace(example, label=None)
        if example.label not in classes:
            raise UsageError(
                f"{example.origin}: label '{example.label}' is not one of {', '.join(labels)}"
            )
        yield example


def _is_whole(label: str) -> bool:
    return bool(_NUMBER.fullmatch(label)) and float(label).is_integer()


def hold_out(
    examples: Sequence[Example], count: int, *, salt: str
) -> tuple[list[Example], list[Example]]:
    """Up to `count` examples, each class by its share, and the rest of them.

    Chosen by the rows and `salt` alone. No text stands on both sides, and no class is held out
    whole: the last text of a class stays in the rest.
    """
    shares_left = _shares(Counter(example.label for example in examples), count)
    labels_of: dict[tuple[str, str | None], set[str | None]] = defaultdict(set)
    for example in examples:
        labels_of[example.content].add(example.label)
    texts_left = Counter(label for labels in labels_of.values() for label in labels)
    order = list(range(len(examples)))
    random.Random(salt).shuffle(order)
    held: list[int] = []
    contents: set[tuple[str, str | None]] = set()
    for index in order:
        example = examples[index]
        if not shares_left[example.label]:
            continue
        if example.content not in contents:
            labels = labels_of[example.content]
            if any(texts_left[label] == 1 for label in labels):
                continue
            texts_left.subtract(labels)
            contents.add(example.content)
        shares_left[example.label] -= 1
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


def _shares(sizes: Counter[str | None], count: int) -> Counter[str | None]:
    """`count` shared out in proportion to the sizes: whole parts first, then one each to the
    largest remainders, the larger class first where they are equal.
    """
    total = sizes.total()
    shares = Counter({label: count * size // total for label, size in sizes.items()})
    by_remainder = sorted(
        sizes, key=lambda label: (-(count * sizes[label] % total), -sizes[label], label or "")
    )
    shares.update(by_remainder[: count - shares.total()])
    return shares
