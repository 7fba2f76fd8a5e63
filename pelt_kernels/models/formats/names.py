"""Modules by the ends of their names, as lists of targets and patterns have them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from typing import TypeVar

Value = TypeVar("Value", bound=Hashable)


def shortest_ends(names: Collection[str], modules: Iterable[str]) -> tuple[str, ...]:
    """The shortest ends that fit these names and none else of the modules, in their order."""
    of_all = Counter(end for module in modules for end in _ends(module))
    of_mine = Counter(end for name in names for end in _ends(name))
    found = (
        next((end for end in _ends(name) if of_mine[end] == of_all[end]), name) for name in names
    )
    return tuple(dict.fromkeys(found))


def _ends(name: str) -> Iterator[str]:
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        yield ".".join(parts[-count:])


def with_patterns(values: Mapping[str, Value]) -> tuple[Value, tuple[tuple[str, Value], ...]]:
    """The value that most names have, and patterns with those of the others: by the last word of
    their names where all that end so have one value, else by the whole name.
    """
    ((usual, _),) = Counter(values.values()).most_common(1)
    by_word: dict[str, set[Value]] = {}
    for name, value in values.items():
        by_word.setdefault(name.rpartition(".")[2], set()).add(value)
    patterns: dict[str, Value] = {}
    for name, value in values.items():
        word = name.rpartition(".")[2]
        if value != usual:
            patterns[word if len(by_word[word]) == 1 else f"^{name}"] = value
    return usual, tuple(patterns.items())
