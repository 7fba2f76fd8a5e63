"""What a machine can check of how the project is laid out. Needs no GPU and no build."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import lint_house
import pytest
from parity import CELLS, contract_of

from pelt_kernels.ops import BACKENDS, OPERATORS, _dispatch, cpp_header

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pelt_kernels"
CSRC = ROOT / "csrc"


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
        assert path.read_text() == text, path.name


@pytest.mark.parametrize(("operator", "backend"), CELLS)
def test_a_backend_takes_the_names_of_the_contract(operator, backend):
    backend = _dispatch.backend_of(backend)
    if BACKENDS[backend].file == "triton":
        pytest.importorskip("triton")
    contract, module = contract_of(operator).CONTRACT, _dispatch.implementation(operator, backend)
    asked = list(inspect.signature(module.supports).parameters)
    assert asked == ["signature", "backend", "form", "needs_grad"]
    inputs = {*contract.input_names, *(["seed"] if contract.has_seed else [])}
    wanted = {
        "forward": inputs,
        "backward": {"needs", *contract.gradient_names, *contract.saved_names, *inputs},
    }
    for name, names in wanted.items():
        parameters = inspect.signature(getattr(module, name)).parameters
        first, *others = parameters.values()
        assert first.name == "chosen"
        named = {p.name for p in others if p.kind is not inspect.Parameter.VAR_KEYWORD}
        assert named <= names
        assert named == names or any(
            p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
        )


def test_every_file_is_laid_out_as_it_should():
    """What lint_house.py finds, by its own call."""
    script = Path(__file__).with_name("lint_house.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("file", "text", "sentence"),
    [
        (
            "pelt_kernels/nn/x.py",
            "from ..models import y",
            ":1: imports pelt_kernels.models, which",
        ),
        ("pelt_kernels/nn/x.py", "import pelt_kernels.cli", ":1: imports pelt_kernels.cli, which"),
        ("pelt_kernels/nn/x.py", "\n# y = f(x)", ":2: commented-out code: # y = f(x)"),
        ("pelt_kernels/nn/x.py", "def f():\n" + "    g()\n" * 100, ":1: f has 101 lines, at most"),
        ("pelt_kernels/nn/x.py", "\n" * 401, ": 401 lines, at most 400"),
        (
            "pelt_kernels/nn/x.py",
            "import torch\n\nfrom pelt_kernels.ops import _C",
            ":3: an import by",
        ),
        ("csrc/ops/x/fwd_sm80.cu", "\n" * 601, ": 601 lines, at most 600"),
        ("csrc/ops/x/fwd_sm80.cu", "f<<<1, 1>>>();", ":1: a kernel launch, which stands in csrc/"),
        (
            "csrc/cuda/x.h",
            "#include <torch/all.h>",
            ":1: a header of torch, which stands in nowhere",
        ),
        (
            "python_tests/ops/x.py",
            "torch.allclose(a, b)",
            ":1: a tolerance, which stands in nowhere",
        ),
    ],
)
def test_the_lint_finds(file, text, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr(lint_house, "ROOT", tmp_path)
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    (found,) = lint_house.findings(lint_house.source_files())
    assert found.startswith(file + sentence)
