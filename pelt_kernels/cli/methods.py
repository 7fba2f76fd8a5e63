"""`pelt-kernels methods`"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import MISSING, asdict, fields
from typing import Annotated, Any, get_type_hints

import typer
from rich.markup import escape
from rich.table import Table

from . import choices
from .console import Debug, errors_in_one_line, results


def methods(
    name: Annotated[
        choices.Method | None, typer.Argument(help="The method whose fields to list.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="All of it as one JSON object.")] = False,
    debug: Debug = False,
) -> None:
    """List the methods and how they train by default, or what `train --set` reaches in one."""
    with errors_in_one_line(debug):
        from ..training.recipes import RECIPES

        told = {each: _described(each) for each in ([name] if name else RECIPES)}
        if as_json:
            typer.echo(json.dumps(told, indent=2, ensure_ascii=False))
        elif name is None:
            table = Table("method", "what it is", "lr", "epochs", "batch")
            for each, facts in told.items():
                recipe = facts["recipe"]
                numbers = (f"{recipe[key]:g}" for key in ("lr", "epochs", "batch_size"))
                table.add_row(each, escape(facts["summary"]), *numbers)
            results().print(table)
        else:
            results().print(told[name]["summary"], markup=False)
            table = Table("--set", "takes", "default")
            for field, facts in told[name]["fields"].items():
                table.add_row(field, facts["takes"], escape(facts["default"]))
            results().print(table)


def _described(name: str) -> dict[str, Any]:
    """What a method is, its training defaults and its fields."""
    from ..methods import METHODS, PRESETS, make_config
    from ..training.recipes import RECIPES

    paragraph = " ".join((PRESETS[name].__doc__ or "").partition("\n\n")[0].split())
    summary = re.split(r"[.:](?: |$)", paragraph.replace("`", ""))[0]
    # A composite has no parts, which make it a method, until they are given.
    config = None if name == "composite" else make_config(name)
    kind = METHODS[name] if config is None else type(config)
    return {
        "summary": summary,
        "recipe": asdict(RECIPES[name]),
        "fields": dict(_fields(kind, config)),
    }


def _fields(kind: Any, config: Any, before: str = "") -> Iterator[tuple[str, dict[str, str]]]:
    """Each field by its name for ``--set``, with what it takes and its default. A part that is left
    out is followed by the defaults that it would come in with.
    """
    from ..methods import MethodConfig
    from ..methods.options import kind_of, words_for

    hints = get_type_hints(kind)
    for field in fields(kind):
        path = before + field.name
        inner, is_optional = kind_of(hints[field.name])
        value = field.default if config is None else getattr(config, field.name)
        if isinstance(inner, type) and issubclass(inner, MethodConfig):
            is_left_out = value in (None, MISSING)
            takes = "none, default or the fields below"
            yield path, {"takes": takes, "default": "none" if is_left_out else "default"}
            yield from _fields(inner, inner() if is_left_out else value, f"{path}.")
        else:
            yield path, {"takes": words_for(inner, is_optional), "default": _text(value)}


def _text(value: Any) -> str:
    """As ``--set`` takes it."""
    if isinstance(value, tuple):
        pairs = (":".join(map(str, v)) if isinstance(v, tuple) else str(v) for v in value)
        return ",".join(pairs)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
