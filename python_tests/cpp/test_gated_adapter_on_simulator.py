"""gated_adapter's CUDA kernels under hostile orders: no result depends on the seed, nor on which other sentences there are.

Closeness to the reference is the parity test's business; here every comparison is bitwise.
"""

from __future__ import annotations

import pytest
import torch
from cases import Case, make_attributes, make_inputs
from cases.gated_adapter import BANKS, CASES, NORM_BANKS, NORMS, POOLED, UNIPELT
from torch import Tensor

from pelt_kernels.ops import _dispatch, _native
from pelt_kernels.ops.gated_adapter import _operator
from pelt_kernels.ops.gated_adapter.contract import CONTRACT

pytestmark = pytest.mark.backend("cuda_sim")

# More tiles in a sentence than the simulator has blocks (three), so that blocks come back to their tiles.
LONG = [
    Case("long", {"B": 2, "S": 300, "D": 72, "R": 20}, UNIPELT, POOLED),
    Case(
        "long_norms",
        {"B": 2, "S": 260, "D": 64, "R": 16},
        f"{UNIPELT}, {NORMS}",
        {**POOLED, "dropout_p": 0.1},
    ),
    Case(
        "long_norm_banks",
        {"B": 3, "S": 150, "D": 64, "R": 16, "M": 2, "M_up": 3},
        f"{BANKS}, {NORM_BANKS}, gate_weight, gate_bias, mask, residual",
        POOLED,
    ),
    # The same where chunks and ranks are whole, which other kernels serve.
    Case("long_chunks", {"B": 2, "S": 300, "D": 128, "R": 64}, UNIPELT, POOLED),
    Case(
        "long_rank_128",
        {"B": 1, "S": 250, "D": 192, "R": 128},
        "b_down, b_up, gate per row",
        {"dropout_p": 0.1},
    ),
    Case("sentences_in_waves", {"B": 7, "S": 70, "D": 64, "R": 48}, UNIPELT, POOLED),
    Case(
        "long_skipped",
        {"B": 3, "S": 270, "D": 64, "R": 48},
        UNIPELT,
        {**POOLED, "skip_below": 0.5},
        is_inference=True,
    ),
]
SERVED = [case for case in CASES if case.sizes["D"] % 8 == 0 and case.sizes["B"] > 0]


@pytest.fixture
def simulator():
    yield _native.library("_C_sim")
    _native.library("_C_sim").set_seed(1)


def _run(case: Case, values: list, dy: Tensor | None = None) -> list[Tensor]:
    """y and the gate's value; with dy also every gradient."""
    leaves = [
        None if v is None else v.detach().requires_grad_(dy is not None and v.is_floating_point())
        for v in values
    ]
    y, gate = _operator(leaves, make_attributes(CONTRACT, case), 5, "cuda_sim")
    if dy is None:
        return [y, gate]
    asked = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    return [y.detach(), gate, *torch.autograd.grad(y, asked, dy, materialize_grads=True)]


@pytest.mark.parametrize("case", SERVED + LONG, ids=lambda case: case.id)
def test_no_result_depends_on_the_order(case: Case, simulator) -> None:
    values = make_inputs(CONTRACT, case, torch.bfloat16)
    dy = (
        None
        if case.is_inference
        else torch.randn(values[0].shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    )
    results = []
    for seed in (1, 2, 3):
        simulator.set_seed(seed)
        results.append(_run(case, values, dy))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    assert all(torch.isfinite(a).all() for a in results[0])


@pytest.mark.parametrize("asked", ["x", "w_down", "b_up gate_weight", "x pre_norm_weight"])
def test_a_gradient_does_not_depend_on_which_others_are_asked(asked: str, simulator) -> None:
    case = LONG[1]
    values = make_inputs(CONTRACT, case, torch.bfloat16)
    dy = torch.randn(values[0].shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    floating = [
        n for n, v in zip(CONTRACT.input_names, values) if v is not None and v.is_floating_point()
    ]
    whole = dict(zip(floating, _run(case, values, dy)[2:]))
    names = asked.split()
    for name, value in zip(CONTRACT.input_names, values):
        if value is not None and value.is_floating_point():
            value.requires_grad_(name in names)
    y, _ = _operator(values, make_attributes(CONTRACT, case), 5, "cuda_sim")
    leaves = [v for n, v in zip(CONTRACT.input_names, values) if n in names]
    for name, grad in zip(
        sorted(names, key=CONTRACT.input_names.index), torch.autograd.grad(y, leaves, dy)
    ):
        assert torch.equal(grad, whole[name]), name


@pytest.mark.parametrize("case", [LONG[0], LONG[3], LONG[5], LONG[6]], ids=lambda case: case.id)
def test_a_sentence_does_not_see_the_others(case: Case, simulator) -> None:
    values = make_inputs(CONTRACT, case, torch.bfloat16)
    batched = {"x", "mask", "residual"}
    y, gate = _run(case, values)
    for b in range(case.sizes["B"]):
        alone = [
            v[b : b + 1] if name in batched else v for name, v in zip(CONTRACT.input_names, values)
        ]
        y_alone, gate_alone = _run(case, alone)
        assert torch.equal(y[b], y_alone[0])
        assert torch.equal(gate[b], gate_alone[0])


def test_refusals_are_sentences_with_numbers(simulator) -> None:
    def why_not(dtype: torch.dtype = torch.bfloat16, **changes: int) -> str:
        sizes = {"B": 2, "S": 8, "D": 64, "R": 16, **changes}
        x, w = (torch.empty(1, dtype=dtype).expand(*(sizes[i] for i in s)) for s in ("BSD", "RD"))
        values = {**dict.fromkeys(CONTRACT.input_names), "x": x, "w_down": w, "w_up": w.T}
        attributes = make_attributes(CONTRACT, Case("plain", {}))
        return _dispatch.why_not("cuda_sim", CONTRACT.bind(list(values.values()), attributes))

    assert why_not() == ""
    assert "D must be a multiple of 8, and D=37" in why_not(D=37)
    assert "R must be 1 to 512, and R=513" in why_not(R=513)
    assert "x is float32" in why_not(torch.float32)
    assert f"they are {2**32}" in why_not(B=2**16, S=2**16)
