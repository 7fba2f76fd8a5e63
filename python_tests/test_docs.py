"""The pages that people read: what they link to exists, and their code runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from tiny_encoder import tiny_model
from tiny_writers import writers

import pelt_kernels
from pelt_kernels.ops import OPERATORS

__all__ = ["tiny_model", "writers"]

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/**/*.md")])


@pytest.mark.checkout
@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        assert (page.parent / target).exists(), target


def names_in(path: Path) -> set[str]:
    """The functions, classes, methods (`Class.method`) and constants of a Python file, or the words
    of another one.
    """
    if path.suffix != ".py":
        return set(re.findall(r"\w+", path.read_text()))
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = (inner for inner in node.body if isinstance(inner, ast.FunctionDef))
            names |= {f"{node.name}.{method.name}" for method in methods}
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_link_from_a_name_leads_to_the_file_that_has_it(page):
    for name, target in re.findall(r"\[`([\w.]+)`\]\(([^)#\s]+)\)", page.read_text()):
        path = page.parent / target
        if path.is_file() and name != path.name:
            assert name in names_in(path), f"{name} in {target}"


def code_of(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


# test_package.py runs the README's; the simulator's page shows a call of a kernel of one's own.
OTHERS = {ROOT / "README.md", ROOT / "docs" / "simulator.md"}
WITH_CODE = [page for page in PAGES if page not in OTHERS and code_of(page)]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_code_of_a_page_runs(page, tiny_model, writers, tmp_path, monkeypatch):
    """One block after the other, with tiny models under the names of the large ones."""
    if page.name == "quantised.md":
        pytest.importorskip("bitsandbytes")  # of the extra `quantised`
    monkeypatch.chdir(tmp_path)
    names = {"bert-base-uncased": tiny_model, "gpt2": writers["gpt2"], "t5-small": writers["t5"]}
    scope: dict[str, object] = {}
    for code in code_of(page):
        for name, folder in names.items():
            code = code.replace(f'"{name}"', repr(str(folder)))
        exec(code, scope)


def test_every_method_and_operator_has_a_page_with_its_docstring():
    text = "\n".join(page.read_text() for page in PAGES)
    shown = set(re.findall(r"^::: pelt_kernels\.(\S+)$", text, re.MULTILINE))
    assert {config.__name__ for config in pelt_kernels.METHODS.values()} <= shown
    assert {f"ops.{operator}.{operator}" for operator in OPERATORS} <= shown
