"""What a model is told of a row beside its text: the labels of attributes, and the task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UsageError
from .example import Example

ATTRIBUTES, TASKS = "attributes", "tasks"  # the model's inputs


@dataclass(frozen=True)
class Conditions:
    """The labels of each attribute, by its name, and the names of the tasks, each in the order of
    their numbers. Where there is one task, none is named.
    """

    attributes: tuple[tuple[str, tuple[str, ...]], ...] = ()
    tasks: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.attributes or self.tasks)

    def counts(self) -> dict[str, int]:
        """How many labels each attribute has."""
        return {name: len(labels) for name, labels in self.attributes}

    def numbers(self, example: Example) -> dict[str, Any]:
        """The inputs of a row: ``attributes`` {name: number} and ``tasks``, a number, as far as
        there are any. Raises UsageError at a label that no training row had.
        """
        found: dict[str, Any] = {}
        if self.attributes:
            given = dict(example.attributes)
            found[ATTRIBUTES] = {
                name: _number(example, f"attribute {name}", given.get(name), labels)
                for name, labels in self.attributes
            }
        if self.tasks:
            found[TASKS] = _number(example, "task", example.task, self.tasks)
        return found

    def checked(self, examples: Iterable[Example]) -> Iterator[Example]:
        """The examples. Raises UsageError at the first whose labels are not known."""
        for example in examples:
            self.numbers(example)
            yield example

    def filled(self, example: Example, given: dict[str, str], task: str | None) -> Example:
        """The example with the labels that hold for every row."""
        attributes = (*example.attributes, *given.items())
        return replace(example, attributes=attributes, task=task or example.task)


NO_CONDITIONS = Conditions()


def conditions_of(
    examples: Iterable[Example], order: Callable[[set[str]], Iterable[str]] = sorted
) -> Conditions:
    """Those of the training rows; `order` puts labels in order."""
    labels: dict[str, set[str]] = {}
    tasks: set[str] = set()
    for example in examples:
        for name, label in example.attributes:
            labels.setdefault(name, set()).add(label)
        if example.task is not None:
            tasks.add(example.task)
    attributes = tuple((name, tuple(order(values))) for name, values in labels.items())
    return Conditions(attributes, tuple(order(tasks)) if len(tasks) > 1 else ())


def _number(example: Example, what: str, label: str | None, labels: tuple[str, ...]) -> int:
    if label is None:
        raise UsageError(
            f"{example.origin}: expected the {what}, one of {', '.join(labels)}, got none"
        )
    if label not in labels:
        raise UsageError(f"{example.origin}: {what} '{label}' is not one of {', '.join(labels)}")
    return labels.index(label)
