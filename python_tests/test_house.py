"""What a machine can check of how the project is laid out. Needs no GPU and no build."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
from parity import CELLS, contract_of

from pelt_kernels.ops import BACKENDS, OPERATORS, _dispatch, cpp_header

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pelt_kernels"
CSRC = ROOT / "csrc"
PYTHON = sorted(
    [
        *PACKAGE.rglob("*.py"),
        *(ROOT / "python_tests").rglob("*.py"),
        *(ROOT / "benchmarks").rglob("*.py"),
    ]
)
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cuh", ".cu", ".cpp"))
# Meaning flows down: a package may import those after it.
LAYERS = ("cli", "training", "integrations", "models", "methods", "nn", "ops")


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operator_folder_has_its_files(operator):
    folder = PACKAGE / "ops" / operator
    assert {"__init__.py", "contract.py", "eager.py"} <= {path.name for path in folder.iterdir()}
    if (folder / "native.py").exists():
        files = {path.name for path in (CSRC / "ops" / operator).iterdir()}
        assert {"contract.h", "params.h", "launch.cpp"} <= files


def test_contracts_in_cpp_are_those_in_python():
    """Otherwise `python -m pelt_kernels.ops.cpp_header` has to be run."""
    for path, text in cpp_header.headers().items():
        assert path.read_text() == text, _relative(path)


@pytest.mark.parametrize(("operator", "backend"), CELLS)
def test_a_backend_takes_the_names_of_the_contract(operator, backend):
    backend = _dispatch.backend_of(backend)
    if BACKENDS[backend].file == "triton":
        pytest.importorskip("triton")
    contract, module = contract_of(operator).CONTRACT, _dispatch.implementation(operator, backend)
    asked = list(inspect.signature(module.supports).parameters)
    assert asked in (["signature", "backend", "form"], ["call"])
    inputs = {*contract.input_names, *(["seed"] if contract.has_seed else [])}
    wanted = {
        "forward": inputs,
        "backward": {"needs", *contract.gradient_names, *contract.saved_names, *inputs},
    }
    for name, names in wanted.items():
        parameters = inspect.signature(getattr(module, name)).parameters
        first, *others = parameters.values()
        assert first.name in ("chosen", "call")
        named = {p.name for p in others if p.kind is not inspect.Parameter.VAR_KEYWORD}
        assert named <= names
        assert named == names or any(
            p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
        )


@pytest.mark.parametrize(
    "operator", [o for o in OPERATORS if not (PACKAGE / "ops" / o / "native.py").exists()]
)
def test_shape_comments_in_params_equal_the_contract(operator):
    contract = contract_of(operator).CONTRACT
    text = (CSRC / "ops" / operator / "params.h").read_text()
    found = dict(
        re.findall(r"\b(\w+)(?: = nullptr)?;\s*// (\[[\w, ]*\](?: \| \[[\w, ]*\])*)", text)
    )
    for row in contract.input_rows:
        shapes = " | ".join(f"[{', '.join(shape)}]" for shape in row.shapes)
        assert found.get(row.name) == shapes, row.name
        if row.is_differentiable and not row.grad_is_dy:
            assert found.get(f"d{row.name}", "").startswith(f"[{', '.join(row.shapes[0])}]"), (
                f"d{row.name}"
            )


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=_relative)
def test_imports_go_only_downward(path):
    parts = path.relative_to(PACKAGE).parts
    if parts[0] not in LAYERS:
        return
    above = LAYERS[: LAYERS.index(parts[0])]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = (
                list(("pelt_kernels", *parts)[: len(parts) + 1 - node.level]) if node.level else []
            )
            modules = [".".join([*base, *filter(None, [node.module])])]
            modules += [f"{modules[0]}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        else:
            continue
        for module in modules:
            assert not any(module.startswith(f"pelt_kernels.{layer}") for layer in above), (
                f"{module} (line {node.lineno})"
            )


def _lines_with(pattern: str, paths: list[Path]) -> set[str]:
    return {_relative(path) for path in paths if re.search(pattern, path.read_text(), re.MULTILINE)}


def test_each_door_has_one_place():
    assert _lines_with(r"<<<", SOURCES) <= {"csrc/common/launch.h"}
    assert _lines_with(r"#include <pybind11", SOURCES) <= {"csrc/bindings/bind.h"}
    assert not _lines_with(r"#include [<\"](torch|ATen|c10)/", SOURCES)
    package = [path for path in PYTHON if path.is_relative_to(PACKAGE)]
    assert _lines_with(r"import _C\b|import_module\(f?[\"']pelt_kernels\.", package) == {
        "pelt_kernels/ops/_native.py",
        "pelt_kernels/ops/_dispatch.py",
    }
    assert _lines_with(r"pelt_kernels\.\{?_?C|pelt_kernels\.\{name\}", package) == {
        "pelt_kernels/ops/_native.py"
    }
    operators = [path for path in PYTHON if path.is_relative_to(ROOT / "python_tests" / "ops")]
    assert not _lines_with(r"\b[ar]tol=|allclose\(", operators)


@pytest.mark.parametrize("path", PYTHON, ids=_relative)
def test_no_commented_out_code(path):
    """A comment that parses as a statement with an operator or a call in it is code."""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        comment = line.strip()
        if not comment.startswith("# "):
            continue
        if re.match(
            r"# (return|import|from|if|for|while|def|class|assert|raise|with)\b.*[:()=]|#"
            r" [\w.\[\]]+ = |# [\w.]+\(.*\)$",
            comment,
        ):
            try:
                ast.parse(
                    comment[2:].rstrip(":") if not comment.endswith(":") else comment[2:] + " pass"
                )
            except SyntaxError:
                continue
            pytest.fail(f"{_relative(path)}:{number}: {comment}")


def test_files_keep_their_budgets():
    too_long = []
    for path in [*PYTHON, *SOURCES]:
        limit = 600 if path.suffix in (".cu", ".cuh") or path.name.endswith("_cpu.cpp") else 400
        lines = path.read_text().count("\n")
        if lines > limit:
            too_long.append(f"{_relative(path)}: {lines} lines, at most {limit}")
    assert not too_long
