"""What is particular to masked_weight and symmetric_kl in Triton: refusals, exact masks over several
programs, confident models, and kernels compiled for GPUs that are not here.

Parity, determinism and the rest are the general tests of python_tests/ops, under
TRITON_INTERPRET=1.
"""

from __future__ import annotations

import pytest
import torch
from parity import contract_of

pytest.importorskip("triton.language")  # not this folder, which also has the name

from test_compile_ahead import check, compiled

from pelt_kernels.ops import masked_weight, symmetric_kl
from pelt_kernels.ops.masked_weight import triton as weights
from pelt_kernels.ops.masked_weight.contract import highest
from pelt_kernels.ops.symmetric_kl import triton as divergence

KERNELS = {
    "masked_weight": ("score", "count", "equal", "write", "bwd_rows", "bwd_columns", "bwd_sum"),
    "symmetric_kl": ("fwd", "mean", "bwd"),
}
SHORT = {"masked_weight": ("pst-bf16",), "symmetric_kl": ("tokens-bf16",)}


def _weight_refusal(rows, columns, r=8, r2=8, dtype=torch.float32):
    """Of a call with these sizes; its tensors hold no memory."""
    shapes = ((rows, columns), (rows, r), (r, columns), (rows, r2), (r2, columns), (rows,))
    values = [torch.empty(s, dtype=dtype, device="meta") for s in (*shapes, (columns,))]
    signature = contract_of("masked_weight").CONTRACT.bind(values, [0, 1.0, 1.0, 1.0])
    return weights.supports(signature, "triton", "")


def _logits_refusal(rows, classes, dtype=torch.float32):
    z = torch.empty(rows, classes, dtype=dtype, device="meta")
    signature = contract_of("symmetric_kl").CONTRACT.bind([z, z, None], [])
    return divergence.supports(signature, "triton", "")


def test_refusals_name_the_number():
    assert _weight_refusal(2, 2, dtype=torch.float64) == (
        "it takes float32, float16 or bfloat16, and w0 is float64"
    )
    assert _weight_refusal(2, 2, r2=33) == (
        "its registers hold factors of at most 32 ranks, and they have R=8 and R2=33"
    )
    assert _weight_refusal(2**16, 2**15) == (
        "it counts entries in 32 bits, so Dout Din must be below 2**31, and it is 2147483648"
    )
    assert _logits_refusal(2, 2, torch.float64) == (
        "it takes float32, float16 or bfloat16, and z1 is float64"
    )
    assert _logits_refusal(2, 2**30) == (
        "it counts rows and columns in 32 bits, so T and C must be below 2**30, and they are 2 and"
        " 1073741824"
    )


def _scores():
    random = torch.randn(67, 71, generator=torch.Generator().manual_seed(0))
    with_nan = random.clone()
    with_nan[random > 1.5] = float("nan")
    with_nan[random < -1.5] = float("inf")
    return {
        "random": random,
        "equal": torch.full((67, 71), 0.5),
        "few_values": (random * 4).round(),
        "nan_and_inf": with_nan,
    }


@pytest.mark.backend("triton")
@pytest.mark.parametrize("keep", [0, 1, 2500, 67 * 71 - 1])
@pytest.mark.parametrize("name", _scores())
def test_the_mask_is_that_of_a_stable_sort(name, keep):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scores = _scores()[name]
    nothing = [torch.zeros(s, device=device) for s in ((67, 1), (1, 71), (67, 1), (1, 71), 67, 71)]
    y = masked_weight(scores.to(device), *nothing, keep, backend="triton").cpu()
    expected = torch.where(highest(scores.abs(), keep), scores, 0.0)
    assert torch.equal(y.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.backend("triton")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("classes", [40, 2100])
def test_what_is_no_number_stays_in_its_row(value, classes):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    z1, z2 = torch.randn(2, 3, classes, device=device)
    z1[1, 5] = value
    z1.requires_grad_()
    rest = torch.tensor([True, False, True], device=device)
    assert not symmetric_kl(z1, z2, backend="triton").isfinite()
    loss = symmetric_kl(z1, z2, rest, backend="triton")
    (dz1,) = torch.autograd.grad(loss, z1)
    assert torch.equal(loss, symmetric_kl(z1[rest], z2[rest], backend="triton"))
    assert not dz1[1].any() and dz1[rest].isfinite().all()


@pytest.mark.parametrize("operator", KERNELS)
def test_every_kernel_compiles_ahead(operator, target, tmp_path):
    check(operator, KERNELS, target, compiled(target, operator, SHORT[operator], tmp_path))


@pytest.mark.parametrize("operator", KERNELS)
def test_no_kernel_compiled_ahead_spills(operator, every_case, tmp_path):
    """On sm_90."""
    found = compiled("cuda:90", operator, () if every_case else SHORT[operator], tmp_path)
    check(operator, KERNELS, "cuda:90", found)
    assert not [kernel for kernel in found if kernel["spilled"]]
