"""The embedded task: does this docstring describe this function?

Pairs of a name, split into words, and the first paragraph of a docstring, read from the standard
library of the running Python. Half are true; the other half carry the name of another function of
the same file, so that the topic alone gives nothing away. The source is parsed, never imported.
"""

from __future__ import annotations

import ast
import platform
import random
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from ..errors import RunError
from .example import Example
from .examples import LARGEST_DEV, LARGEST_TEST, Task

NAME = "docstring-match"
LABELS = ("no", "yes")
LEAST_WORDS = 5
# Tests describe nothing; idlelib and turtledemo are programs; lib2to3, distutils and ensurepip come
# and go with the version and the packager.
LEFT_OUT = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__",
    "idlelib", "turtledemo", "lib2to3", "distutils", "ensurepip",
}  # fmt: skip

_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_BLANK_LINE = re.compile(r"\n\s*\n")


def load(root: Path | None = None) -> Task:
    """The task from the source below `root`, by default the running Python's standard library.

    Equal sources give equal splits: files are walked in sorted order, and a docstring that stands
    at several places is one group, which goes to one part as a whole.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    by_file = collect(root)
    # docstring -> name -> the first file that has both
    groups: dict[str, dict[str, str]] = defaultdict(dict)
    for file, pairs in by_file.items():
        for name, docstring in pairs:
            groups[docstring].setdefault(name, file)
    docstrings = sorted(groups)
    if len(docstrings) < 10:
        raise RunError(
            f"{NAME}: expected the source of the standard library in {root}, got {len(docstrings)} "
            "docstrings"
        )
    random.Random(f"{NAME} split").shuffle(docstrings)
    test = min(LARGEST_TEST, len(docstrings) // 5)
    dev = min(LARGEST_DEV, len(docstrings) // 10)
    bounds = {"test": (0, test), "dev": (test, test + dev), "train": (test + dev, len(docstrings))}
    parts = {
        part: _pair_up(
            [(text, name, file) for text in docstrings[a:b] for name, file in groups[text].items()],
            by_file,
            part,
        )
        for part, (a, b) in bounds.items()
    }
    sources = dict.fromkeys(parts, f"docstrings of Python {platform.python_version()}")
    return Task(NAME, LABELS, parts["train"], parts["dev"], parts["test"], sources)


def collect(root: Path) -> dict[str, list[tuple[str, str]]]:
    """Per file, in sorted order, its distinct pairs of a name in words and a docstring's first
    paragraph.
    """
    by_file = {}
    for path in _source_files(root):
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:
            continue  # a template, or source of another Python version
        pairs = sorted(set(_described(tree)))
        if pairs:
            by_file[path.relative_to(root).as_posix()] = pairs
    return by_file


def split_name(name: str) -> str:
    """``get_content_charset`` and ``GetContentCharset`` -> ``get content charset``."""
    return " ".join(word.lower() for word in _WORDS.findall(name))


def _source_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if path.name not in LEFT_OUT and not path.name.startswith("config-"):
                yield from _source_files(path)
        elif path.suffix == ".py":
            yield path


def _described(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("__"):
            continue
        paragraph = " ".join(_BLANK_LINE.split(ast.get_docstring(node) or "")[0].split())
        name = split_name(node.name)
        if name and len(paragraph.split()) >= LEAST_WORDS:
            yield name, paragraph


def _pair_up(
    described: list[tuple[str, str, str]], by_file: dict[str, list[tuple[str, str]]], part: str
) -> tuple[Example, ...]:
    """Examples from (docstring, name, file), every second one with another name of the same file.

    Names are drawn from the described functions only and files with one name are left out, so that
    neither a name nor a docstring tells the answer by itself.
    """
    draw = random.Random(f"{NAME} {part}")
    examples: list[Example] = []
    for docstring, name, file in described:
        true_names = {other for other, text in by_file[file] if text == docstring}
        others = sorted({other for other, _ in by_file[file]} - true_names)
        if not others:
            continue
        is_true = len(examples) % 2 == 0
        shown = name if is_true else draw.choice(others)
        examples.append(Example(shown, docstring, LABELS[is_true], f"a docstring of {file}"))
    draw.shuffle(examples)
    return tuple(examples)
