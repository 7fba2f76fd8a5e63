"""What is timed against computes what is timed: every peer is held to the reference, outputs and
gradients, on the contract's own cases.
"""

from __future__ import annotations

import parity
import pytest
import torch
from cases import cases_of, make_attributes
from closeness import assert_close

from benchmarks import contenders, lora_block, rows, shapes
from pelt_kernels.ops import OPERATORS
from pelt_kernels.ops._dispatch import contract_of
from pelt_kernels.ops._philox import dropout_factor

# The Linear without its branch does less, which is what it is there to show.
LESS = {"frozen linear"}
ROWS = [
    pytest.param(operator, case, name, id=f"{operator}-{case.id}-{name}")
    for operator in OPERATORS
    for case in cases_of(operator)
    for name in contenders.peers_of(operator, case)
    if name not in LESS
]


@pytest.fixture
def same_dropout(monkeypatch):
    """The operators' own dropout instead of torch's, which draws other values."""

    def dropout(x, p):
        rows = x.flatten(0, -2)
        return x * dropout_factor(*rows.shape, p, parity.SEED, rows).view_as(x)

    def attention(q, k, v, mask, p, *, scale, enable_gqa):
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        scores = scale * (q @ k.transpose(-1, -2))
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return dropout(scores.softmax(-1), p) @ v

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    real = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, mask, p, **more: (attention if p else real)(q, k, v, mask, p, **more),
    )


@pytest.mark.parametrize(("operator", "case", "name"), ROWS)
def test_a_peer_computes_what_the_reference_computes(operator, case, name, same_dropout):
    contract = contract_of(operator).CONTRACT
    peer = contenders.peers_of(operator, case)[name]
    named = dict(zip(contract.attribute_names, make_attributes(contract, case)))
    values = parity.inputs_of(operator, case, "float32")
    found = parity.evaluate(operator, case, values, lambda given: peer(*given, **named))
    baseline, truth = parity.expected(operator, case, "float32")
    frozen = {f"d{row}" for row in shapes.FROZEN.get(operator, ())}
    compared = found.keys() - (set() if name == "plain" else frozen)
    assert compared >= {contract.public_rows[0].name}
    for what in sorted(compared):
        draws = (
            parity.expected(operator, case, "float32", draw=draw)
            for draw in range(1, 1 + parity.OTHER_DRAWS)
        )
        others = ((b[what], t[what]) for b, t in draws)
        assert_close(found[what], baseline[what], truth[what], torch.float32, what, others)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_plain_serves_every_measured_case(operator, device):
    for case in shapes.cases_of(operator, device):
        assert "plain" in contenders.peers_of(operator, case), case.id


@pytest.mark.parametrize("operator", OPERATORS)
def test_plain_runs_in_bfloat16_with_parameters_of_either_kind(operator):
    case = next(case for case in cases_of(operator) if case.is_quick and not case.fill)
    contract = contract_of(operator).CONTRACT
    named = dict(zip(contract.attribute_names, make_attributes(contract, case)))
    peer = contenders.peers_of(operator, case)["plain"]
    for precision in ("bfloat16", "bfloat16-master"):
        values = parity.inputs_of(operator, case, precision)
        found = parity.evaluate(operator, case, values, lambda given: peer(*given, **named))
        first = contract.public_rows[0]
        wanted = torch.float32 if first.kind == "float32" else torch.bfloat16
        assert found[first.name].dtype == wanted


@pytest.mark.filterwarnings("ignore")
def test_a_whole_model_beside_peft(tmp_path):
    """It compares both outputs itself."""
    pytest.importorskip("peft")
    sizes = "--width 64 --layers 1 --length 8 --rank 2 --rounds 1"
    assert lora_block.main([*sizes.split(), "--json", str(tmp_path / "row.jsonl")]) == 0
    (row,) = rows.read(tmp_path / "row.jsonl")
    assert row["width"] == 64
    assert min(*row["processor"].values(), *row["clock"].values()) > 0
