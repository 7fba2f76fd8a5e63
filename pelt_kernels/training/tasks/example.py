"""One row of a task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Label = str | tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """One row: a text, perhaps a second one, and the label where it is known, or several, or the
    text that is to be written; the labels of its attributes by name, and its task's name.
    """

    text: str
    pair: str | None
    label: Label | None
    origin: str  # for messages: "row 17 of train.tsv"
    attributes: tuple[tuple[str, str], ...] = ()
    task: str | None = None

    @property
    def content(self) -> tuple[str, str | None]:
        return self.text, self.pair

    @property
    def read(self) -> tuple[Any, ...]:
        """All that a model reads of it."""
        return self.text, self.pair, self.attributes, self.task
