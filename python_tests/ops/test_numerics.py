"""The references' gradients, what is kept for backward, determinism, and identities between
operators' arguments.
"""

from __future__ import annotations

import pytest
import torch
from cases import case_of, cases_of, make_attributes, make_inputs
from closeness import assert_close
from parity import (
    QUICK,
    SEED,
    able,
    cells,
    contract_of,
    device_of,
    has_true_gradient,
    inputs_of,
    operator_of,
    run,
    why_refused,
    why_unavailable,
)
from torch.autograd.graph import saved_tensors_hooks

from pelt_kernels.ops import (
    LearnedGate,
    LoraBranch,
    Prefix,
    gated_adapter,
    lora_linear,
    prefix_attention,
)
from pelt_kernels.ops._dispatch import backend_of

# A case of each operator as its method calls it.
METHOD_CASES = {
    "gated_adapter": "unipelt",
    "prefix_attention": "unipelt",
    "lora_linear": "unipelt",
    "masked_weight": "pst",
    "symmetric_kl": "tokens",
}


@pytest.mark.parametrize(
    ("operator", "case_id"), [quick for quick in QUICK if has_true_gradient(quick[0])]
)
def test_gradcheck_of_the_reference(operator, case_id):
    """Finite differences in random directions; a kink of relu is far enough away at this seed."""
    module, case = contract_of(operator), case_of(operator, case_id)
    values = make_inputs(module.CONTRACT, case, torch.float64, seed=3)
    attributes = dict(zip(module.CONTRACT.attribute_names, make_attributes(module.CONTRACT, case)))
    leaves = [
        v
        for value in values
        for v in (value if isinstance(value, list) else [value])
        if v is not None
    ]
    leaves = [v.requires_grad_() for v in leaves if v.is_floating_point()]

    def loss(*_):
        outputs = module.reference(
            *values, **attributes, **({"seed": SEED} if module.CONTRACT.has_seed else {})
        )
        flat = [o for out, row in zip(outputs, module.CONTRACT.public_rows) if row.is_differentiable
                for o in (out if isinstance(out, (list, tuple)) else [out])]  # fmt: skip
        return tuple(flat)

    assert torch.autograd.gradcheck(loss, leaves, fast_mode=True)


# Triton's interpreter computes one block after another: two runs of it would say nothing.
AT_ONCE = [cell for cell in cells() if cell[1] != "triton" or device_of(cell[1]) != "cpu"]


@pytest.mark.parametrize(("operator", "backend"), AT_ONCE)
def test_two_runs_give_the_same_bits(operator, backend, need, request):
    need(backend_of(backend), why_unavailable(operator, backend))
    if (operator, backend) == ("prefix_attention", "cuda:composed"):
        # torch's flash attention sums dq by atomics unless it is asked not to.
        torch.use_deterministic_algorithms(True)
        request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    for case in cases_of(operator):
        if case.is_quick and not why_refused(operator, backend, case, "bfloat16"):
            first, second = (run(operator, backend, case, "bfloat16") for _ in range(2))
            for name, value in first.items():
                assert torch.equal(value, second[name]), f"{case.id}: {name}"


def bytes_kept(function, given):
    """Bytes that autograd keeps beyond the tensors in ``given`` (by storage, each once)."""
    known = {t.untyped_storage().data_ptr() for t in given}
    kept = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(kept.values())


@pytest.mark.parametrize(
    ("operator", "backend"),
    [
        (operator, backend)
        for operator, name in METHOD_CASES.items()
        for backend in able(operator, case_of(operator, name), "float32", "bfloat16")
        if backend != "triton"
    ],
)
def test_only_what_the_contract_names_is_kept_for_backward(operator, backend, need):
    """Beyond the inputs: h [B, S, R], or out and the log-sum-exp, or s [B, S, R]; and the gates'
    values. The mask [Dout, Din]; the log-sum-exps [2, T].
    """
    need(backend_of(backend), why_unavailable(operator, backend))
    case = case_of(operator, METHOD_CASES[operator])
    precision = "bfloat16" if why_refused(operator, backend, case, "float32") else "float32"
    values = [
        v.requires_grad_()
        if v is not None and not isinstance(v, list) and v.is_floating_point()
        else v
        for v in inputs_of(operator, case, precision)
    ]
    given = [
        v
        for value in values
        for v in (value if isinstance(value, list) else [value])
        if v is not None
    ]
    attributes = make_attributes(contract_of(operator).CONTRACT, case)
    sizes, size = case.sizes, 2 if precision == "bfloat16" else 4
    allowed = {
        "gated_adapter": lambda: sizes["B"] * sizes["S"] * sizes["R"] * size + 4 * sizes["B"],
        "prefix_attention": lambda: sizes["B"] * sizes["H"] * sizes["S"] * (sizes["E"] * size + 4),
        "lora_linear": lambda: sizes["B"] * sizes["S"] * sum(sizes["R_i"]) * size + 4 * sizes["B"],
        "masked_weight": lambda: sizes["Dout"] * sizes["Din"],
        "symmetric_kl": lambda: 2 * 4 * sizes["T"],
    }[operator]()
    out = []
    kept = bytes_kept(
        lambda: out.append(operator_of(operator)(values, attributes, SEED, backend)), given
    )
    assert 0 < kept <= allowed


def test_residual_and_base_weight_cost_no_memory():
    """The residual's gradient is dy, and a frozen weight has none: neither adds a byte to what x
    and h take.
    """
    x, residual = (
        torch.randn(2, 64, 16, requires_grad=True),
        torch.randn(2, 64, 16, requires_grad=True),
    )
    w_down, w_up = torch.randn(4, 16, requires_grad=True), torch.randn(16, 4, requires_grad=True)
    seen = []

    def pack(t):
        seen.append(t)
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        y = gated_adapter(x, w_down, w_up, residual=residual, backend="eager")
    assert not any(t is residual or t.data_ptr() == residual.data_ptr() for t in seen)
    (dx,) = torch.autograd.grad(y, residual, torch.full_like(y, 3.0))
    assert torch.equal(dx, torch.full_like(y, 3.0))


def test_zero_b_gives_the_base_output_bit_for_bit():
    x, weight, bias = torch.randn(2, 7, 24), torch.randn(24, 24), torch.randn(24)
    branch = LoraBranch(
        torch.randn(8, 24),
        torch.zeros(24, 8),
        gate=LearnedGate(torch.randn(24), torch.zeros(1), "mean"),
    )
    assert torch.equal(
        lora_linear(x, weight, bias, [branch]), torch.nn.functional.linear(x, weight, bias)
    )


def _close_in_float64(found, expected, what):
    assert_close(found, expected, expected, torch.float64, what)


def test_no_prefix_is_plain_attention():
    q, k, v = (torch.randn(2, 4, n, 16, dtype=torch.float64) for n in (7, 9, 9))
    mask = torch.rand(2, 9) < 0.7
    mask[:, 0] = True
    for out, options in (
        (prefix_attention(q, k, v), {}),
        (prefix_attention(q, k, v, key_mask=mask), {"attn_mask": mask[:, None, None]}),
    ):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
        error = (out - expected).abs().max()
        assert error < 1e-14, error


def test_segments_and_tables_are_ways_to_write_one_prefix():
    q = torch.randn(3, 2, 6, 8, dtype=torch.float64)
    table_k, table_v = (torch.randn(4, 5, 2, 8, dtype=torch.float64) for _ in range(2))
    index, gate = torch.tensor([2, 0, 2]), torch.rand(3, dtype=torch.float64)
    whole = prefix_attention(q, q, q, [Prefix(table_k, table_v, index)], gate=gate)
    for cut in range(6):
        parts = [
            Prefix(table_k[:, :cut], table_v[:, :cut], index),
            Prefix(table_k[:, cut:], table_v[:, cut:], index),
        ]
        assert (prefix_attention(q, q, q, parts, gate=gate) - whole).abs().max() < 1e-14
    for i, member in enumerate(index):
        alone = prefix_attention(
            q[i : i + 1],
            q[i : i + 1],
            q[i : i + 1],
            [Prefix(table_k[member], table_v[member])],
            gate=gate[i : i + 1],
        )
        assert (alone - whole[i : i + 1]).abs().max() < 1e-14


def test_a_gate_of_zero_leaves_zero_keys_with_their_share():
    q = torch.randn(2, 2, 6, 8, dtype=torch.float64)
    prefix, zero = (
        torch.randn(3, 2, 8, dtype=torch.float64),
        torch.zeros(3, 2, 8, dtype=torch.float64),
    )
    gated = prefix_attention(
        q, q, q, [Prefix(prefix, prefix)], gate=torch.zeros(2, dtype=torch.float64)
    )
    assert (gated - prefix_attention(q, q, q, [Prefix(zero, zero)])).abs().max() < 1e-14
    assert (gated - prefix_attention(q, q, q)).abs().max() > 1e-3


def test_two_branches_are_one_block_diagonal_branch():
    x, weight = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(12, 12, dtype=torch.float64)
    a1, a2, b1, b2 = (
        torch.randn(s, dtype=torch.float64) for s in ((3, 12), (4, 12), (6, 3), (6, 4))
    )
    two = lora_linear(x, weight, None, [LoraBranch(a1, b1, 0, 2.0), LoraBranch(a2, b2, 6, 2.0)])
    one = lora_linear(
        x, weight, None, [LoraBranch(torch.cat([a1, a2]), torch.block_diag(b1, b2), 0, 2.0)]
    )
    merged = weight + 2.0 * torch.cat([b1 @ a1, b2 @ a2])
    assert (two - one).abs().max() < 1e-12
    assert (two - torch.nn.functional.linear(x, merged)).abs().max() < 1e-12


@pytest.mark.parametrize("pooling", ["token", "mean", "masked_mean"])
def test_a_learned_gate_is_its_value_given_by_hand(pooling):
    x, mask = torch.randn(3, 5, 12), torch.rand(3, 5) < 0.6
    gate = LearnedGate(torch.randn(12), torch.randn(1), pooling)
    rows = torch.sigmoid(x @ gate.weight + gate.bias)
    value = {
        "token": rows,
        "mean": rows.mean(1),
        "masked_mean": (rows * mask).sum(1) / mask.sum(1).clamp(min=1),
    }[pooling]
    w_down, w_up = torch.randn(4, 12), torch.randn(12, 4)
    y, found = gated_adapter(x, w_down, w_up, gate=gate, mask=mask, return_gate=True)
    assert found.dtype == torch.float32 and not found.requires_grad
    _close_in_float32(found, value, "gate value")
    _close_in_float32(y, gated_adapter(x, w_down, w_up, gate=value), "y")


def _close_in_float32(found, expected, what):
    error = (found - expected).abs().max().item()
    assert error <= 16 * torch.finfo(torch.float32).eps * expected.abs().max().item(), (
        f"{what}: {error}"
    )


def test_skipped_rows_return_their_residual_untouched():
    x, gate = torch.randn(2, 8, 16), torch.rand(2, 8)
    with torch.no_grad():
        y = gated_adapter(x, torch.randn(4, 16), torch.randn(16, 4), gate=gate, skip_below=0.5)
    skipped = gate < 0.5
    assert torch.equal(y[skipped], x[skipped]) and not torch.equal(y[~skipped], x[~skipped])
