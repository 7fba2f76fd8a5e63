"""Reading back JSON that a run wrote: every value must have the type it was written with."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from .errors import RunError, reason

_WORDS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    NoneType: "null",
}


def read_record(
    path: Path,
    types: Mapping[str, Any],
    who: str,
    *,
    has_defaults: bool = False,
    optional: Collection[str] = (),
) -> dict[str, Any]:
    """The object in a JSON file, in which every name of `types` has a value of its type, save that
    the `optional` ones may be missing. Further names are allowed; with `has_defaults` they are
    refused, and names may be missing.

    Raises RunError in one sentence, with the name.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise RunError(f"{who}: {path} is damaged ({reason(error)})") from error
    if not isinstance(values, dict):
        raise RunError(f"{who}: {path} is damaged (expected an object, got {values!r:.80})")
    missing = [name for name in types if name not in values and name not in optional]
    missing = [] if has_defaults else missing
    unknown = [name for name in values if name not in types] if has_defaults else []
    if missing or unknown:
        wrong = f"{missing[0]} is missing" if missing else f"unknown: {unknown[0]!r:.80}"
        raise RunError(f"{who}: {path} is damaged ({wrong})")
    for name in (name for name in types if name in values):
        wrong = mismatch(values[name], types[name], name)
        if wrong:
            raise RunError(f"{who}: {path} is damaged ({wrong})")
    return values


def mismatch(value: Any, hint: Any, name: str) -> str:
    """What is wrong with a value that has no such type, or nothing."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return ""
    if origin in (Union, UnionType):
        fits = any(not mismatch(value, choice, name) for choice in inner)
        return "" if fits else _expected(value, hint, name)
    if origin in (list, tuple) and isinstance(value, list):
        members = ((f"{name}.{index}", member) for index, member in enumerate(value))
    elif origin is dict and isinstance(value, dict):
        members = ((f"{name}.{key}", member) for key, member in value.items())
        inner = inner[1:]
    else:
        return "" if _is_plain(value, hint) else _expected(value, hint, name)
    mismatches = (mismatch(member, inner[0], path) for path, member in members)
    return next(filter(None, mismatches), "")


def _is_plain(value: Any, hint: Any) -> bool:
    if hint is float:
        is_whole = type(value) is int and abs(value) <= sys.float_info.max
        return is_whole or isinstance(value, float)
    return type(value) is hint


def _expected(value: Any, hint: Any, name: str) -> str:
    return f"expected {name} as {_words(hint)}, got {value!r:.80}"


def _words(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(map(_words, inner))
    if origin in (list, tuple):
        return f"a list of {_words(inner[0])}"
    return "an object" if origin is dict else _WORDS[hint]
