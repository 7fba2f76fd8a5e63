"""What stands in a label column: classes, scores, several labels a row, or a text to be written."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

from ..errors import UsageError
from .example import Example

CLASSIFICATION, REGRESSION, MULTI_LABEL = "classification", "regression", "multi-label"
GENERATION = "generation"
PROBLEMS = (CLASSIFICATION, REGRESSION, MULTI_LABEL, GENERATION)
SEPARATOR = ","  # between the labels of a row in CSV and TSV
# More different numbers than this may be scores just as well as classes, so the option has to say.
MOST_NUMBERED_CLASSES = 20

# What files and data sets write for a label that is not known.
UNLABELLED = "-1"

_WHOLE_NUMBER = re.compile(r"-?[0-9]{1,18}")
_NUMBER = re.compile(r"[-+]?([0-9]{1,18}(\.[0-9]{0,18})?|\.[0-9]{1,18})([eE][-+]?[0-9]{1,3})?")


class LabelKind(Protocol):
    """What a task and the card of an adapter know of labels."""

    @property
    def problem(self) -> str:
        """One of PROBLEMS."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes, or the labels that a row may have; none for scores."""

    @property
    def label_separator(self) -> str:
        """What stands between the labels of a row, where they are one text."""


def problem_of(
    examples: Sequence[Example], asked: str | None, where: str, say: Callable[[str], None]
) -> str:
    """The problem that was asked for, else the one that the labels show: several labels in a row,
    numbers with a fraction among them (scores, which `say` is told), else classes.

    Raises UsageError for more than MOST_NUMBERED_CLASSES different numbers that may be either.
    """
    if asked is not None:
        return asked
    if any(isinstance(example.label, tuple) for example in examples):
        return MULTI_LABEL
    labels = {str(example.label) for example in examples if example.label is not None}
    numbers = sorted(label for label in labels if _NUMBER.fullmatch(label))
    fractions = [label for label in numbers if not _is_whole(label)]
    if fractions and len(numbers) == len(labels):
        say(
            f"{where}: the labels are {len(numbers)} different numbers such as {fractions[0]}, "
            "which are learned as scores (--problem regression); --problem classification makes a "
            "class of each"
        )
        return REGRESSION
    if len(numbers) > MOST_NUMBERED_CLASSES:
        others = [label for label in labels if not _NUMBER.fullmatch(label)]
        beside = f" beside '{min(others)}'" if others else ""
        raise UsageError(
            f"{where}: expected classes or scores as labels, got {len(numbers)} different numbers "
            f"such as {numbers[-1]}{beside}, which may be either; say which with --problem "
            "classification or --problem regression"
        )
    return CLASSIFICATION


def vocabulary(
    examples: Sequence[Example], problem: str, separator: str, where: str
) -> tuple[str, ...]:
    """The classes, or the labels of all rows, in their order; none for scores and texts.

    Raises UsageError where there is nothing to learn: fewer than two of them, or one score.
    """
    if problem == GENERATION:
        return ()
    if problem == CLASSIFICATION:
        return classes_of(examples, where)
    if problem == MULTI_LABEL:
        names = {name for example in examples for name in names_of(example, separator)}
        return label_order(_two_at_least(names, where))
    scores = {score_of(example) for example in examples if example.label is not None}
    if len(scores) < 2:
        only = f"only {scores.pop():g}" if scores else "none"
        raise UsageError(f"{where}: expected at least two different scores, got {only}")
    return ()


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
    than two, for a row with several, and for one number written in two ways as 1 and 1.0.
    """
    origins: dict[str, str] = {}
    for example in examples:
        if example.label is not None:
            origins.setdefault(class_of(example), example.origin)
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
    return label_order(_two_at_least(labels, where))


def class_of(example: Example) -> str:
    """The one label of a row. Raises UsageError for several."""
    if isinstance(example.label, tuple):
        raise UsageError(
            f"{example.origin}: expected one label, got {list(example.label)!r:.60}; several "
            f"labels a row are learned with --problem {MULTI_LABEL}"
        )
    return example.label or ""


def score_of(example: Example) -> float:
    """The label as a number. Raises UsageError where it is none."""
    try:
        score = float(class_of(example))
    except ValueError as error:
        if isinstance(error, UsageError):
            raise
        score = math.nan
    if not math.isfinite(score):
        raise UsageError(f"{example.origin}: expected a number as label, got '{example.label}'")
    return score


def names_of(example: Example, separator: str) -> tuple[str, ...]:
    """The labels of a row, each once: those of a list, or of a text with separators."""
    if not isinstance(example.label, str):
        return example.label or ()
    names = (name.strip() for name in example.label.split(separator))
    return tuple(dict.fromkeys(name for name in names if name))


def labels_in(examples: Iterable[Example]) -> set[str]:
    """Every label that one of the examples has."""
    found: set[str] = set()
    for label in (example.label for example in examples if example.label is not None):
        found.update([label] if isinstance(label, str) else label)
    return found


def labelled(
    examples: Sequence[Example], kind: LabelKind, where: str, say: Callable[[str], None]
) -> list[Example]:
    """The examples that have a label; reports how many have none. Raises UsageError at a label that
    `kind` does not know, and where no example is left.
    """
    known = [e for e in with_known_labels(examples, kind) if e.label is not None]
    if not known:
        raise UsageError(f"{where}: expected labels, got none or {UNLABELLED} in every row")
    if len(known) < len(examples):
        say(
            f"{where}: {len(examples) - len(known)} of {len(examples)} rows are left out, having "
            f"no label ({UNLABELLED})"
        )
    return known


def with_known_labels(examples: Iterable[Example], kind: LabelKind) -> Iterator[Example]:
    """The examples with their labels as the problem has them, and None for UNLABELLED where that is
    no class. Raises UsageError at the first label that `kind` does not know, and at a score that is
    no number.
    """
    classes = set(kind.labels)
    for example in examples:
        if example.label is None or kind.problem == GENERATION:
            yield example
        elif kind.problem == REGRESSION:
            score_of(example)
            yield example
        elif kind.problem == MULTI_LABEL:
            names = names_of(example, kind.label_separator)
            _check_known(names, classes, kind, example)
            yield replace(example, label=names)
        elif example.label == UNLABELLED and UNLABELLED not in classes:
            yield replace(example, label=None)
        else:
            _check_known([class_of(example)], classes, kind, example)
            yield example


def strata(examples: Sequence[Example], problem: str) -> list[str]:
    """The class of each row by which parts are held out in proportion: its label, of several the
    one that fewest rows have; where labels are scores or texts, its task.
    """
    if problem == CLASSIFICATION:
        return [class_of(example) for example in examples]
    if problem == MULTI_LABEL:
        sizes = Counter(name for example in examples for name in example.label or ())
        return [
            min(example.label or ("",), key=lambda name: (sizes[name], name))
            for example in examples
        ]
    return [example.task or "" for example in examples]


def _check_known(
    names: Iterable[str], classes: set[str], kind: LabelKind, example: Example
) -> None:
    for name in names:
        if name not in classes:
            raise UsageError(
                f"{example.origin}: label '{name}' is not one of {', '.join(kind.labels)}"
            )


def _two_at_least(labels: set[str], where: str) -> set[str]:
    if len(labels) < 2:
        only = f"only '{labels.pop()}'" if labels else "none"
        raise UsageError(f"{where}: expected at least two labels, got {only}")
    return labels


def _is_whole(label: str) -> bool:
    return bool(_NUMBER.fullmatch(label)) and float(label).is_integer()
