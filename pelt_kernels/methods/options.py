"""A method's config from text, as a command line gives it, or from the values of a file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args, get_origin, get_type_hints

from ._config import METHODS, Counts, MethodConfig, Names, Numbers, config_from_dict, near
from .lora import ALL_LINEAR
from .registry import PRESETS, make_config


def config_from_options(name: str, options: Mapping[str, Any]) -> MethodConfig:
    """The config of a method or preset with fields set from text: ``{"r": "4", "targets":
    "query,key"}``, or ``{"adapter.bottleneck": "16"}`` for a part's field. Of two options for one
    field the later holds.

    Text is read as its field's type asks: numbers, ``true`` and ``false``, names with commas
    between them, numbers by name as ``source:6,category:17``, ``none`` where that is allowed. A
    part is ``none``, ``default``, or its fields; a part that was left out comes in with the first
    of them. Modules are names with commas, or, where another sign than letters, digits, ``_.-`` is
    in the text, one regular expression. Other values are taken as they are, and a part's may be a
    dictionary, so that what `MethodConfig.to_dict` gives can be handed back.

    Raises:
        ValueError: an unknown name or field, text that is not of the field's type, or a value the
            config refuses.
    """
    if name not in PRESETS:
        make_config(name)  # has the sentence for it
    is_plain = name in METHODS
    values: dict[str, Any] = {"method": name} if is_plain else PRESETS[name]().to_dict()
    for path, value in options.items():
        _put(METHODS[values["method"]], values, path, path, value)
    return config_from_dict(values)


def _put(
    config: type[MethodConfig], values: dict[str, Any], path: str, whole: str, value: Any
) -> None:
    """Sets the value at a path inside the dictionary of a config."""
    name, _, rest = path.partition(".")
    known = [field.name for field in fields(config)]
    if path == "method":
        if value != config.method:
            raise ValueError(f"expected {whole} to be {config.method!r}, got {value!r:.80}")
        return
    if name not in known:
        raise ValueError(
            f"expected a field of {config.__name__} ({', '.join(known) or 'it has none'}), got "
            f"{whole!r}{near(name, known)}"
        )
    kind, is_optional = kind_of(get_type_hints(config)[name])
    is_part = isinstance(kind, type) and issubclass(kind, MethodConfig)
    if rest:
        if not is_part:
            raise ValueError(f"expected {name} without further fields, got {whole!r}")
        if not isinstance(values.get(name), dict):
            values[name] = {"method": kind.method}
        _put(kind, values[name], rest, whole, value)
        return
    if is_part and isinstance(value, Mapping):
        # Control prefixes stand where prefixes do.
        given = METHODS.get(str(value.get("method", kind.method)), kind)
        kind = given if issubclass(given, kind) else kind
        values[name] = {"method": kind.method}
        for inner, member in value.items():
            _put(kind, values[name], str(inner), f"{whole}.{inner}", member)
        return
    if not isinstance(value, str):
        # `from_dict` would take a dictionary for a config.
        values[name] = list(value.items()) if isinstance(value, Mapping) else value
        return
    text = value
    if is_optional and text.lower() == "none":
        values[name] = None
    elif is_part:
        if text.lower() != "default":
            raise ValueError(
                f"expected {whole} as none, default or its fields such as "
                f"{whole}.{fields(kind)[0].name}=..., got {text!r}"
            )
        values[name] = {"method": kind.method}
    else:
        values[name] = _read(kind, text, whole, is_optional)


def kind_of(hint: Any) -> tuple[Any, bool]:
    """A field's type without None, and whether None is allowed."""
    choices = [choice for choice in get_args(hint) if choice is not type(None)]
    if get_origin(hint) is not tuple and choices and len(choices) < len(get_args(hint)):
        return choices[0], True
    return hint, False


def words_for(kind: Any, is_optional: bool = False) -> str:
    """What a field of this type is called."""
    words: dict[Any, str] = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a word",
        Names: "names with commas or a regular expression",
        Counts: "numbers by name such as source:6,category:17",
        Numbers: "numbers by name such as k_proj:8,v_proj:16",
    }
    if kind not in words:
        return "names with commas" if get_args(kind)[0] is str else "numbers with commas"
    return words[kind] + (" or none" if is_optional else "")


def _read(kind: Any, text: str, whole: str, is_optional: bool) -> Any:
    try:
        if kind in (Counts, Numbers):
            pairs = [part.rsplit(":", 1) for part in text.split(",") if part.strip()]
            number_of = int if kind == Counts else float
            return [(name.strip(), number_of(number)) for name, number in pairs]
        if kind == Names:
            is_pattern = text == ALL_LINEAR or re.fullmatch(r"[\w.,\s-]*", text) is None
            return text if is_pattern else [n.strip() for n in text.split(",") if n.strip()]
        if get_origin(kind) is tuple:
            member = get_args(kind)[0]
            return [member(part.strip()) for part in text.split(",") if part.strip()]
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (ValueError, KeyError):
        raise ValueError(
            f"expected {whole} as {words_for(kind, is_optional)}, got {text!r}"
        ) from None
