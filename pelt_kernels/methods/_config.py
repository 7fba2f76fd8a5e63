"""What every config shares: dictionaries, and checks of one sentence."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

if TYPE_CHECKING:
    from typing_extensions import Self

# The methods by name, which a file gives. `registry` fills it, in the order in which they are told.
METHODS: dict[str, type[MethodConfig]] = {}
GATE_POOLINGS = ("masked_mean", "mean")
# Numbers by name. A config keeps them as pairs: their order, which may matter, outlives JSON files
# with sorted keys.
Counts = Mapping[str, int] | tuple[tuple[str, int], ...]
Numbers = Mapping[str, float] | tuple[tuple[str, float], ...]
# Modules by the ends of their names, or by one regular expression for whole names.
Names = tuple[str, ...] | str

Config = TypeVar("Config", bound="MethodConfig")


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """The base of all configs: immutable, checked when made, equal to what `from_dict` makes of
    `to_dict`.

    `dataclasses.replace(config, field=value)` gives a changed copy.
    """

    method: ClassVar[str] = ""
    RETIRED: ClassVar[tuple[str, ...]] = ()  # fields that earlier files hold; read over

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the method's name, then the fields; a part is another such."""
        values: dict[str, Any] = {"method": self.method}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, MethodConfig):
                value = value.to_dict()
            values[field.name] = _plain(value)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The config that `to_dict` described.

        Raises:
            ValueError: another method's dictionary, an unknown field, or a value the config
                refuses.
        """
        if not isinstance(values, dict):
            raise ValueError(f"{cls.__name__}: expected a dictionary, got {type(values).__name__}")
        name = values.get("method", cls.method)
        if name != cls.method:
            raise ValueError(f"{cls.__name__}: expected method {cls.method!r}, got {name!r}")
        known = [field.name for field in fields(cls)]
        read_over = ("method", *cls.RETIRED)
        unknown = [key for key in values if key not in known and key not in read_over]
        if unknown:
            raise ValueError(
                f"{cls.__name__}: expected the fields {', '.join(known) or '(none)'}, got the "
                f"unknown {', '.join(repr(key) for key in unknown)}"
            )
        arguments = {}
        for key, value in values.items():
            if key not in known:
                continue
            if isinstance(value, dict) and "method" not in value:
                raise ValueError(
                    f"{cls.__name__}: expected {key} as a config with its 'method' or a plain "
                    f"value, got {value!r:.80}"
                )
            arguments[key] = config_from_dict(value) if isinstance(value, dict) else value
        return cls(**arguments)


def _plain(value: Any) -> Any:
    """Lists in the place of tuples."""
    return [_plain(member) for member in value] if isinstance(value, tuple) else value


def config_from_dict(values: dict[str, Any]) -> MethodConfig:
    """The config that a ``to_dict`` described, whichever method it is of.

    Raises:
        ValueError: no dictionary, no or an unknown ``method``, an unknown field, or a value the
            config refuses.
    """
    if not isinstance(values, dict) or "method" not in values:
        raise ValueError(
            f"config_from_dict: expected a dictionary with the key 'method', got {values!r:.80}"
        )
    if not isinstance(values["method"], str) or values["method"] not in METHODS:
        raise ValueError(
            f"config_from_dict: expected method to be one of {', '.join(METHODS)}, got "
            f"{values['method']!r}"
        )
    return METHODS[values["method"]].from_dict(values)


def near(name: str, known: Iterable[str]) -> str:
    """``" (did you mean r?)"`` for a name like a known one; empty where none is near."""
    found = get_close_matches(name, dict.fromkeys(known), n=3)
    return f" (did you mean {' or '.join(found)}?)" if found else ""


def with_changes(config: Config, **changes: Any) -> Config:
    """`dataclasses.replace` without the fields whose value is already there."""
    changed = {key: value for key, value in changes.items() if getattr(config, key) != value}
    return replace(config, **changed) if changed else config


def with_part_changes(config: Config, kind: type[MethodConfig], **changes: Any) -> Config:
    """The config with changed fields where it is of a kind, or in its part of that kind."""
    if isinstance(config, kind):
        return replace(config, **changes)
    for field in fields(config):
        part = getattr(config, field.name)
        if isinstance(part, kind):
            return replace(config, **{field.name: replace(part, **changes)})
    return config


def check(is_right: bool, config: MethodConfig, name: str, words: str) -> None:
    """Raises ValueError with the field's value, and what was expected of it, unless it is right."""
    if not is_right:
        raise ValueError(
            f"{type(config).__name__}: expected {name} {words}, got {getattr(config, name)!r:.80}"
        )


def check_int(config: MethodConfig, name: str, at_least: int, optional: bool = False) -> None:
    """The field is an int >= at_least (or None where that is allowed)."""
    value = getattr(config, name)
    is_whole = isinstance(value, int) and not isinstance(value, bool) and value >= at_least
    words = f"as a whole number >= {at_least}{' or None' if optional else ''}"
    check(is_whole or (optional and value is None), config, name, words)


def check_number(config: MethodConfig, name: str) -> None:
    """The field is a finite number."""
    value = getattr(config, name)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    is_finite = is_number and abs(value) <= sys.float_info.max
    check(is_finite, config, name, "as a finite number")


def check_dropout(config: MethodConfig, name: str) -> None:
    """The field is a probability below 1."""
    check_number(config, name)
    check(0.0 <= getattr(config, name) < 1.0, config, name, "in [0, 1)")


def check_choice(config: MethodConfig, name: str, choices: tuple[str, ...]) -> None:
    """The field is one of the choices."""
    is_known = getattr(config, name) in choices
    check(is_known, config, name, f"to be one of {', '.join(choices)}")


def check_flag(config: MethodConfig, name: str) -> None:
    """The field is True or False."""
    check(isinstance(getattr(config, name), bool), config, name, "as True or False")


def check_parts(config: MethodConfig, kinds: dict[str, type[MethodConfig]]) -> None:
    """Each field is a config of its kind, or None."""
    for name, kind in kinds.items():
        part = getattr(config, name)
        if part is not None and not isinstance(part, kind):
            raise ValueError(
                f"{type(config).__name__}: expected {name} as {kind.__name__} or None, got "
                f"{type(part).__name__}"
            )


def set_names(config: MethodConfig, name: str, choices: tuple[str, ...]) -> None:
    """The field lists different ones of the choices; makes it a tuple."""
    value = getattr(config, name)
    are_known = (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(member, str) and member in choices for member in value)
        and len(set(value)) == len(value)
    )
    words = f"as a list of different names out of {', '.join(choices)}"
    check(are_known, config, name, words)
    object.__setattr__(config, name, tuple(value))


def set_modules(config: MethodConfig, name: str, words: str, others: tuple[str, ...] = ()) -> None:
    """The field names modules: a list of different names, which it makes a tuple, or one regular
    expression.

    Args:
        words: what a list may hold.
        others: texts that stand for something else than a regular expression.
    """
    value = getattr(config, name)
    if isinstance(value, str):
        if value not in others:
            check_pattern(config, name, value)
        return
    are_names = (
        isinstance(value, (list, tuple))
        and all(isinstance(member, str) and member.strip() == member != "" for member in value)
        and len(set(value)) == len(value)
    )
    choices = " or ".join(["one regular expression", *(repr(other) for other in others)])
    check(are_names, config, name, f"as a list of different names ({words}), or {choices}")
    object.__setattr__(config, name, tuple(value))


def check_pattern(config: MethodConfig, name: str, pattern: str) -> None:
    """Raises ValueError unless the text is a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(
            f"{type(config).__name__}: expected {name} with a regular expression, got "
            f"{pattern!r:.80}: {error}"
        ) from None


def set_numbers(config: MethodConfig, name: str) -> None:
    """The field has finite numbers by name, a dictionary or pairs; makes it a tuple of pairs."""
    value = getattr(config, name)
    pairs = tuple(value.items()) if isinstance(value, Mapping) else value
    are_numbers = isinstance(pairs, (list, tuple)) and all(
        isinstance(pair, (list, tuple))
        and len(pair) == 2
        and isinstance(pair[0], str)
        and isinstance(pair[1], (int, float))
        and not isinstance(pair[1], bool)
        and abs(pair[1]) <= sys.float_info.max
        for pair in pairs
    )
    are_numbers = are_numbers and len({pair[0] for pair in pairs}) == len(pairs)
    check(are_numbers, config, name, "as finite numbers by different names")
    object.__setattr__(config, name, tuple((key, number) for key, number in pairs))


def set_counts(config: MethodConfig, name: str, at_least: int) -> None:
    """The field has whole numbers by name, a dictionary or pairs; makes it a tuple of pairs."""
    value = getattr(config, name)
    pairs = tuple(value.items()) if isinstance(value, Mapping) else value
    are_counts = isinstance(pairs, (list, tuple)) and all(
        isinstance(pair, (list, tuple))
        and len(pair) == 2
        and isinstance(pair[0], str)
        and isinstance(pair[1], int)
        and not isinstance(pair[1], bool)
        and pair[1] >= at_least
        for pair in pairs
    )
    are_counts = are_counts and len({pair[0] for pair in pairs}) == len(pairs)
    check(are_counts, config, name, f"as whole numbers >= {at_least} by different names")
    object.__setattr__(config, name, tuple((key, number) for key, number in pairs))


def set_layers(config: MethodConfig, name: str) -> None:
    """The field lists layers by number; makes it a tuple."""
    value = getattr(config, name)
    are_layers = isinstance(value, (list, tuple)) and all(
        isinstance(layer, int) and not isinstance(layer, bool) and layer >= 0 for layer in value
    )
    check(are_layers, config, name, "as a list of layer numbers from 0")
    object.__setattr__(config, name, tuple(value))


def set_tokens(config: MethodConfig, name: str) -> None:
    """The field lists different words by id; negative ids count from the last. Makes it a tuple."""
    value = getattr(config, name)
    are_ids = (
        isinstance(value, (list, tuple))
        and all(isinstance(word, int) and not isinstance(word, bool) for word in value)
        and len(set(value)) == len(value)
    )
    check(are_ids, config, name, "as a list of different ids of words")
    object.__setattr__(config, name, tuple(value))


def check_gate(config: MethodConfig) -> None:
    """Checks the two gate fields of a part."""
    gated = config.gated  # type: ignore[attr-defined]
    is_flag = gated is None or isinstance(gated, bool)
    check(is_flag, config, "gated", "as True, False or None")
    check_choice(config, "gate_pooling", GATE_POOLINGS)


def set_tasks(config: MethodConfig, name: str = "tasks") -> None:
    """The field lists different names of tasks; makes it a tuple."""
    value = getattr(config, name)
    are_names = (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(task, str) and task.strip() == task != "" for task in value)
        and len(set(value)) == len(value)
    )
    check(are_names, config, name, "as a list of different names of tasks")
    object.__setattr__(config, name, tuple(value))
