"""What can be checked of how each file is laid out. Needs no build and imports nothing of the project.

    python python_tests/lint_house.py [FILE ...]

Without names every source file is looked at. A line for each finding; ends with 1 if there are any.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PYTHON, CPP = (".py",), (".h", ".cuh", ".cu", ".cpp")
# Meaning flows down: a package may import those after it.
LAYERS = ("cli", "training", "integrations", "models", "methods", "nn", "ops")
MOST_LINES = 400
MOST_LINES_OF_KERNELS = 600  # in a file whose name ends so:
KERNELS = (".cu", ".cuh", "_cpu.cpp")
MOST_LINES_OF_A_FUNCTION = 100
# Triton compiles a kernel from one function, and its nested ones cannot write to its variables.
LONGER_FUNCTIONS = {
    ("pelt_kernels/ops/gated_adapter/_triton_bwd_rows.py", "_gated_adapter_bwd_rows_kernel"): 157,
    (
        "pelt_kernels/ops/gated_adapter/_triton_bwd_columns.py",
        "_gated_adapter_bwd_columns_kernel",
    ): 191,
}
CODE = re.compile(
    r"# (return|import|from|if|for|while|def|class|assert|raise|with)\b.*[:()=]"
    r"|# [\w.\[\]]+ = |# [\w.]+\(.*\)$"
)


class Door(NamedTuple):
    """What stands in these files only, of those that lie in a folder and have one of the endings."""

    what: str
    pattern: str
    folder: str
    endings: tuple[str, ...]
    files: tuple[str, ...] = ()


_NATIVE, _DISPATCH = "pelt_kernels/ops/_native.py", "pelt_kernels/ops/_dispatch.py"
DOORS = (
    Door("a kernel launch", r"<<<", "csrc", CPP, ("csrc/common/launch.h",)),
    Door("pybind11", r"#include <pybind11", "csrc", CPP, ("csrc/bindings/bind.h",)),
    Door("a header of torch", r"#include [<\"](torch|ATen|c10)/", "csrc", CPP),
    Door(
        "an import by name",
        r"import _C\b|import_module\(f?[\"']pelt_kernels\.",
        "pelt_kernels",
        PYTHON,
        (_NATIVE, _DISPATCH),
    ),
    Door(
        "a compiled module",
        r"pelt_kernels\.\{?_?C|pelt_kernels\.\{name\}",
        "pelt_kernels",
        PYTHON,
        (_NATIVE,),
    ),
    Door("a tolerance", r"\b[ar]tol=|allclose\(", "python_tests/ops", PYTHON),
)


def source_files() -> list[str]:
    """Every file that there are rules for, as the root sees it."""
    endings = {"csrc": CPP, "pelt_kernels": PYTHON, "python_tests": PYTHON, "benchmarks": PYTHON}
    return sorted(
        path.relative_to(ROOT).as_posix()
        for folder, of_folder in endings.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in of_folder
    )


def findings(files: Sequence[str]) -> Iterator[str]:
    """What is wrong, a sentence each, with the file and where it is known the line."""
    for file in files:
        text = (ROOT / file).read_text()
        yield from _too_many_lines(file, text)
        yield from _wrong_doors(file, text)
        if file.endswith(PYTHON):
            tree = ast.parse(text)
            yield from _imports_of_layers_above(file, tree)
            yield from _long_functions(file, tree)
            yield from _commented_out_code(file, text)


def idle_exceptions() -> Iterator[str]:
    """Exceptions that nothing needs any more."""
    for (file, name), lines in LONGER_FUNCTIONS.items():
        tree = ast.parse((ROOT / file).read_text())
        if (name, lines) not in ((found, n) for found, _, n in _functions(tree)):
            yield f"{file}: expected {name} to have {lines} lines, as LONGER_FUNCTIONS says"
    for door in DOORS:
        for file in door.files:
            if not re.search(door.pattern, (ROOT / file).read_text()):
                yield f"{file}: expected {door.what}, as DOORS says"


def _too_many_lines(file: str, text: str) -> Iterator[str]:
    limit = MOST_LINES_OF_KERNELS if file.endswith(KERNELS) else MOST_LINES
    lines = text.count("\n")
    if lines > limit:
        yield f"{file}: {lines} lines, at most {limit}"


def _wrong_doors(file: str, text: str) -> Iterator[str]:
    for door in DOORS:
        is_meant = file.startswith(f"{door.folder}/") and file.endswith(door.endings)
        match = re.search(door.pattern, text) if is_meant and file not in door.files else None
        if match:
            line = text.count("\n", 0, match.start()) + 1
            places = " and ".join(door.files) or "nowhere"
            yield f"{file}:{line}: {door.what}, which stands in {places}"


def _imports_of_layers_above(file: str, tree: ast.Module) -> Iterator[str]:
    package, *parts = Path(file).parts
    if package != "pelt_kernels" or parts[0] not in LAYERS:
        return
    above = tuple(f"pelt_kernels.{layer}" for layer in LAYERS[: LAYERS.index(parts[0])])
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = [package, *parts][: len(parts) + 1 - node.level] if node.level else []
            modules = [".".join([*base, *filter(None, [node.module])])]
            modules += [f"{modules[0]}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        module = next((module for module in modules if module.startswith(above)), "")
        if module:
            yield f"{file}:{node.lineno}: imports {module}, which lies above {parts[0]}"


def _functions(tree: ast.Module) -> Iterator[tuple[str, int, int]]:
    """Each function's name, the line where it begins, and how many it has."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node.lineno, (node.end_lineno or node.lineno) - node.lineno + 1


def _long_functions(file: str, tree: ast.Module) -> Iterator[str]:
    for name, line, lines in _functions(tree):
        limit = LONGER_FUNCTIONS.get((file, name), MOST_LINES_OF_A_FUNCTION)
        if lines > limit:
            yield f"{file}:{line}: {name} has {lines} lines, at most {limit}"


def _commented_out_code(file: str, text: str) -> Iterator[str]:
    """A comment that parses as a statement with an operator or a call in it is code."""
    for number, line in enumerate(text.splitlines(), 1):
        comment = line.strip()
        if CODE.match(comment):
            try:
                ast.parse(comment[2:] + " pass" if comment.endswith(":") else comment[2:])
            except SyntaxError:
                continue
            yield f"{file}:{number}: commented-out code: {comment}"


def main(arguments: Sequence[str]) -> int:
    """0, or 1 with a line for each finding."""
    known = source_files()
    asked = {Path(name).resolve().relative_to(ROOT).as_posix() for name in arguments}
    found = list(findings([file for file in known if not asked or file in asked]))
    found += [] if asked else idle_exceptions()
    print("\n".join(found), end="\n" if found else "")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
