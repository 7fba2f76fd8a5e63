"""What is particular to gated_adapter in Triton: refusals, lazy import, dropout's words, tuning.

Parity, determinism and the rest are the general tests of python_tests/ops, under
TRITON_INTERPRET=1.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import case_of, make_attributes
from parity import contract_of, inputs_of, operator_of

from pelt_kernels.ops import _philox
from pelt_kernels.ops.gated_adapter import triton as backend

ROOT = Path(__file__).resolve().parents[2]


def bind(dtype=torch.float32, **sizes):
    """The call of a plain adapter of these sizes; its tensors hold no memory."""
    b, s, d, r = (sizes.get(letter, 16) for letter in "BSDR")
    values = dict.fromkeys(contract_of("gated_adapter").CONTRACT.input_names)
    values |= {
        "x": torch.empty(b, s, d, dtype=dtype, device="meta"),
        "w_down": torch.empty(r, d, dtype=dtype, device="meta"),
        "w_up": torch.empty(d, r, dtype=dtype, device="meta"),
    }
    contract = contract_of("gated_adapter").CONTRACT
    return contract.bind(list(values.values()), [row.default for row in contract.attribute_rows])


def refusal(*dtype, **sizes):
    return backend.supports(bind(*dtype, **sizes), "triton", "")


def python(code, **environment):
    """What a fresh Python prints."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    variables |= {"PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_refusals_name_the_number():
    assert refusal(torch.float64) == ("it takes float32, float16 or bfloat16, and x is float64")
    assert refusal(torch.bfloat16, D=2**20, R=2**11) == (
        "it counts the numbers of a weight in 32 bits, and D x R are 2**31 or more"
    )
    assert "2**31" in refusal(B=2**16, S=2**15, D=1)


def test_without_triton_the_reason_is_one_sentence(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert backend.unavailable("cpu") == "Triton is not installed (pip install triton)"
    assert backend.unavailable("cuda") == "Triton is not installed (pip install triton)"


UNAVAILABLE = """
{before}
import sys
from pelt_kernels.ops.gated_adapter import triton as backend
assert "triton" not in sys.modules or {imported}
{after}
print(backend.unavailable("cpu"))
"""


def test_the_interpreter_is_asked_for_before_triton_is_imported():
    pytest.importorskip("triton.language")
    plain = UNAVAILABLE.format(before="", after="", imported=False)
    assert "set TRITON_INTERPRET=1 before Python starts" in python(plain)
    assert python(plain, TRITON_INTERPRET="1").strip() == ""
    late = "import os; os.environ['TRITON_INTERPRET'] = '1'"
    late = UNAVAILABLE.format(before="import triton", after=late, imported=True)
    assert "after Triton was imported" in python(late)


def test_the_package_needs_no_triton():
    """Importing it, and a call on another backend, leave Triton alone even where it is broken."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from pelt_kernels import gated_adapter\n"
        "from pelt_kernels.ops.gated_adapter import triton\n"
        "w = torch.ones(4, 8)\n"
        "print(gated_adapter(torch.ones(2, 8), w, w.T.contiguous(), backend='eager').shape)"
    )
    assert "[2, 8]" in python(code)


@pytest.mark.backend("triton")
@pytest.mark.parametrize("seed", [0, 1, 16, 2**31, 2**32 + 5, 2**63 + 7, 2**64 - 1])
def test_dropout_keeps_exactly_the_words_of_the_contract(seed):
    """Seeds at which Triton would change an argument's type, and a width that is no multiple of 4."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, columns, p = 19, 37, 0.4
    x = torch.zeros(rows, columns, device=device)
    w_down = torch.zeros(1, columns, device=device)
    w_up = torch.zeros(columns, 1, device=device)
    y = operator_of("gated_adapter")(
        (x[None], w_down, None, w_up, torch.ones(columns, device=device), *[None] * 12),
        ("relu", "none", "none", 1.0, 1e-5, 1e-5, p, float("-inf")),
        seed,
        "triton",
    )[0]
    expected = _philox.keep_mask(rows, columns, p, seed, torch.device("cpu"))
    assert torch.equal(y[0].cpu() != 0, expected)


@pytest.mark.backend("triton")
def test_memory_that_does_not_fit_makes_the_tile_smaller():
    if torch.cuda.is_available():
        pytest.skip("the kernels run compiled here")
    from triton import OutOfResources

    contract, case = contract_of("gated_adapter").CONTRACT, case_of("gated_adapter", "plain")
    values = inputs_of("gated_adapter", case, "float32")
    plan = backend.Plan(contract.bind(values, make_attributes(contract, case)))
    before, tried = dict(plan.configs), []

    def launch(config):
        tried.append(config)
        if len(tried) < 4:
            raise OutOfResources(200_000, 99 * 1024, "shared memory")

    plan.launch("columns", launch)
    sizes = [config.block_t * config.block_d * config.stages for config in tried]
    assert sizes == sorted(sizes, reverse=True) and plan.configs["columns"] == tried[-1]

    def never(config):
        raise OutOfResources(200_000, 99 * 1024, "shared memory")

    with pytest.raises(OutOfResources):
        plan.launch("columns", never)
    plan.configs.update(before)
