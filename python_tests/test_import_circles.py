"""No module of the package needs itself: imports form no circle, those inside functions and those
for type checkers included. Needs no GPU and no build.
"""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "pelt_kernels"


def _modules(package: Path) -> dict[str, Path]:
    """The modules of a package by name."""
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _imports(name: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """The modules that a module imports from. A name of a package is the module of that name, if
    there is one, else the package's own.
    """
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inside = f"{origin}.{alias.name}"
                found.add(inside if inside in modules else origin)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return (found & modules.keys()) - {name}


def circles(package: Path) -> set[frozenset[str]]:
    """The circles of a package's imports: one of those that share an import, which is enough to
    see that there is one.
    """
    modules = _modules(package)
    graph = {name: _imports(name, path, modules) for name, path in modules.items()}
    found = set()
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            after, *others = circle = error.args[1]
            found.add(frozenset(circle))
            graph[others[0]].discard(after)
        else:
            return found


def test_imports_form_no_circle():
    assert not circles(PACKAGE)


@pytest.mark.parametrize(
    "late",
    [
        "from .a import x",
        "def f():\n    from . import a",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..thing.a import x",
        "import thing.a",
    ],
    ids=["plain", "in a function", "for a type checker", "absolute"],
)
def test_a_circle_is_seen(tmp_path, late):
    folder = tmp_path / "thing"
    folder.mkdir()
    for name, text in {"__init__": "from .b import x", "a": "from .b import x", "b": late}.items():
        (folder / f"{name}.py").write_text(text)
    assert circles(folder) == {frozenset({"thing.a", "thing.b"})}
    (folder / "b.py").write_text("import ast")
    assert circles(folder) == set()
