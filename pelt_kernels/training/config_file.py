"""The options of an experiment from a YAML or JSON file, and as YAML.

The fields are `TrainConfig`'s, so a run's own `run.json` is such a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import yaml

from ..methods._config import near
from .config import TrainConfig, with_tuples
from .errors import UsageError, reason
from .records import mismatch


class _Loader(yaml.SafeLoader):
    """YAML whose numbers may be written 1e-3, which YAML 1.1 takes for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9]+[.]?[0-9]*|[.][0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def read_options(path: Path, others: Mapping[str, str]) -> dict[str, Any]:
    """The options in a file by `TrainConfig`'s fields, and ``output``. What is null is left out; a
    value alone stands for a list of one.

    Args:
        others: further names of fields, such as ``learning_rate`` of ``lr``.

    Raises:
        UsageError: a file that cannot be read, an unknown field, one that is given twice, or a
            value of another type.
    """
    types: dict[str, Any] = get_type_hints(TrainConfig) | {"output": str}
    options: dict[str, Any] = {}
    for name, value in _content(path).items():
        plain = str(name).replace("-", "_")
        field = plain if plain in types else others.get(plain)
        if field not in types:
            raise UsageError(
                f"config: {path} has the unknown field '{name}'{near(plain, (*types, *others))}; "
                "--print-config shows all fields"
            )
        if field in options:
            raise UsageError(f"config: {path} gives {field} twice, once as '{name}'")
        if value is None:
            continue
        is_list = get_origin(types[field]) is tuple
        options[field] = [value] if is_list and not isinstance(value, list) else value
        wrong = mismatch(options[field], types[field], field)
        if wrong:
            raise UsageError(f"config: {path}: {wrong}")
    return with_tuples(options)


def _content(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        # YAML takes no tabs, with which JSON may be indented.
        is_json = path.suffix.lower() == ".json"
        content = json.loads(text) if is_json else yaml.load(text, _Loader)
    except OSError as error:
        raise UsageError(f"config: {path} cannot be read ({error.strerror})") from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        words = " ".join(str(error).split()) or reason(error)
        raise UsageError(f"config: {path} is neither YAML nor JSON ({words:.200})") from error
    if not isinstance(content, dict | None):
        raise UsageError(f"config: expected fields and values in {path}, got {content!r:.80}")
    return content or {}


def as_yaml(config: TrainConfig) -> str:
    """A resolved config with every field of its method. What depends on the data is null."""
    values = asdict(config) | {"options": [], "method_config": config.method_for().to_dict()}
    plain = {k: list(value) if isinstance(value, tuple) else value for k, value in values.items()}
    return str(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))
