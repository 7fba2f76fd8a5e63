"""A method's config for the attributes and tasks that a data set has."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from ..methods import MethodConfig
from .errors import UsageError, reason
from .tasks import ATTRIBUTES, TASKS, Conditions


def conditioned(config: MethodConfig, conditions: Conditions) -> MethodConfig:
    """The config with the number of labels of each attribute and the names of the tasks in its
    fields ``attributes`` and ``tasks``, its own or a part's. Attributes that the config lists
    already may have more labels there than the data shows.

    Raises UsageError for a method without such a field, and where the config lists others.
    """
    if conditions.attributes:
        config = _filled(config, ATTRIBUTES, tuple(conditions.counts().items()))
    if conditions.tasks:
        config = _filled(config, TASKS, conditions.tasks)
    return config


def _filled(config: MethodConfig, field: str, value: tuple[Any, ...]) -> MethodConfig:
    changed, count = _with(config, field, value)
    if not count:
        option = "--attribute-column" if field == ATTRIBUTES else "--task-column or several --task"
        raise UsageError(
            f"method {config.method}: expected a method that reads {field}, such as "
            f"{'control_prefixes' if field == ATTRIBUTES else 'vlm'}; without them leave out "
            f"{option}"
        )
    return changed


def _with(config: MethodConfig, field: str, value: tuple[Any, ...]) -> tuple[MethodConfig, int]:
    """The config with a field set wherever it or one of its parts has it, and in how many."""
    count = 0
    changes: dict[str, Any] = {}
    for each in fields(config):
        current = getattr(config, each.name)
        if isinstance(current, MethodConfig):
            changes[each.name], inner = _with(current, field, value)
            count += inner
        elif each.name == field:
            changes[field] = _agreed(config, field, current, each.default, value)
            count += 1
    try:
        return replace(config, **changes), count
    except ValueError as error:
        raise UsageError(f"method {config.method}: {reason(error)}") from error


def _agreed(
    config: MethodConfig, field: str, current: Any, default: Any, value: tuple[Any, ...]
) -> tuple[Any, ...]:
    if current in (default, value):
        return value
    if field == ATTRIBUTES:
        known, found = dict(current), dict(value)
        if known.keys() == found.keys() and all(known[name] >= found[name] for name in found):
            return tuple(current)
    raise UsageError(
        f"method {config.method}: expected {field} as the data has them, {value}, got {current}"
    )
