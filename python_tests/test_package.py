"""The package as a whole: what importing it needs, and what it offers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_encoder import tiny_model

import pelt_kernels
from benchmarks import figures, peft_step, readme
from benchmarks.rows import read

__all__ = ["tiny_model"]

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"

# A finder in front of all others refuses the modules that may be absent.
_WITHOUT = """
import sys
import zipfile

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ABSENT or name in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

ABSENT = %r
sys.meta_path.insert(0, Refusing())
"""
COMPILED = {"pelt_kernels._C", "pelt_kernels._C_sim"}


def _in_a_new_process(absent: set[str], code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT % (absent,) + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_needs_nothing_and_costs_nothing():
    absent = COMPILED | {"triton", "transformers", "torch", "numpy", "matplotlib"}
    code = "import pelt_kernels\nprint(pelt_kernels.__version__, *dir(pelt_kernels))"
    version, *names = _in_a_new_process(absent, code).split()
    assert version == pelt_kernels.__version__
    assert set(pelt_kernels.__all__) <= set(names)


def test_operators_need_neither_compiled_modules_nor_triton_nor_transformers():
    code = """
import torch
from pelt_kernels import explain, gated_adapter, lora_linear, prefix_attention

x, w = torch.randn(4, 8), torch.randn(2, 8)
assert gated_adapter(x, w, w.t().contiguous()).shape == (4, 8)
assert lora_linear(x, torch.randn(8, 8)).shape == (4, 8)
q = torch.randn(1, 2, 4, 32)
assert prefix_attention(q, q, q).shape == q.shape
print(*sorted({choice.backend for choice in explain()}))
"""
    assert _in_a_new_process(COMPILED | {"triton", "transformers"}, code).split() == ["eager"]


def test_every_public_name_loads():
    for name in pelt_kernels.__all__:
        assert getattr(pelt_kernels, name) is not None


def test_the_code_of_the_readme_runs(tiny_model, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    for code in blocks:
        assert code.strip().count("\n") <= 11, "ten lines of use, with a blank one"
        exec(code.replace("bert-base-uncased", str(tiny_model)), {})
    printed = capsys.readouterr().out
    assert "14 modules accelerated, 0 left alone" in printed
    assert "trainable params" in printed
    assert (tmp_path / "adapter" / "pelt_config.json").is_file()


@pytest.mark.checkout
def test_the_generated_tables_of_the_pages_are_current():
    for page, tables in readme.tables().items():
        text = page.read_text()
        assert readme.rewritten(text, tables) == text, "make table rewrites them"


@pytest.mark.checkout
def test_pictures_are_drawn_from_the_rows_and_are_small(tmp_path):
    figures.draw_accuracy(readme.tasks(), tmp_path / "accuracy.png")
    figures.draw_steps(read(peft_step.RESULTS), tmp_path / "steps.png")
    figures.draw_methods(read(readme.STEPS), tmp_path / "methods.png")
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert len(sizes) == 3 and max(sizes.values()) < 100_000, sizes
