"""What `predict` is told of every row: labels of attributes, a task, and how texts are written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..training import Example
    from ..training.predictor import Card
    from ..training.tasks import Columns


@dataclass(frozen=True)
class Same:
    """The labels of attributes, and the task, that hold for every row."""

    attributes: dict[str, str]
    task: str | None

    @classmethod
    def of(cls, card: Card, given: Sequence[str], task: str | None) -> Same:
        """From the command line, as ``name=label``. Raises UsageError for a name that the adapter
        does not know.
        """
        from ..training import UsageError

        attributes: dict[str, str] = {}
        for text in given:
            name, equals, label = text.partition("=")
            if not equals or name not in card.attributes or name in attributes:
                known = ", ".join(card.attributes) or "it has none"
                raise UsageError(
                    f"attribute: expected name=label, once for each of the adapter's attributes "
                    f"({known}), got '{text}'"
                )
            attributes[name] = label
        if task is not None and task not in card.tasks:
            raise UsageError(
                f"task: expected one of the adapter's ({', '.join(card.tasks) or 'it has none'}), "
                f"got '{task}'"
            )
        return cls(attributes, task)

    def columns(self, card: Card, columns: Columns, task_column: str | None) -> Columns:
        """With the columns of what differs from row to row, as in training."""
        from ..training import UsageError

        if task_column is not None and (self.task is not None or not card.tasks):
            raise UsageError(
                "task-column: expected --task or --task-column, and an adapter for several tasks"
            )
        rest = tuple(
            (name, card.attribute_columns.get(name, name))
            for name in card.attributes
            if name not in self.attributes
        )
        has_column = bool(card.tasks) and self.task is None
        task = (task_column or card.task_column or "task") if has_column else None
        return replace(columns, attributes=rest, task=task)

    def checked(self, card: Card, examples: Iterable[Example]) -> Iterator[Example]:
        """The examples with all that holds for them. Raises UsageError at the first that lacks a
        label, or has one that training never showed.
        """
        for example in examples:
            whole = card.conditions.filled(example, self.attributes, self.task)
            card.conditions.numbers(whole)
            yield whole


def check_writing(card: Card, numbers: Sequence[int | None], column: str | None) -> None:
    """Raises UsageError where something is asked of an adapter that does not write texts."""
    from ..training import UsageError
    from ..training.tasks import GENERATION

    asked = column is not None or any(number is not None for number in numbers)
    if asked and card.problem != GENERATION:
        raise UsageError(
            "--beams, --max-new-tokens, --source-column and --target-column go with an adapter "
            f"that writes texts, and this one is for {card.problem}"
        )
