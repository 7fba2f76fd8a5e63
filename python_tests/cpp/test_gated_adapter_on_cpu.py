"""The CPU kernels of gated_adapter: what they refuse, sizes around their blocks, formulas under every
instruction set that this processor runs, and bits that do not depend on threads.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from cases import Case, make_attributes
from cases.gated_adapter import BANKS, NORM_BANKS, NORMS, POOLED, UNIPELT
from closeness import assert_close
from parity import check, contract_of, run

from pelt_kernels import gated_adapter
from pelt_kernels.ops import _dispatch as dispatch
from pelt_kernels.ops import _native as native

OPERATOR = "gated_adapter"
ON_SIMULATED_TILES = True
CONTRACT = contract_of(OPERATOR).CONTRACT
pytestmark = pytest.mark.backend("cpu")

NORMS_AND_SCALE = f"{NORMS}, scale"
# Several tiles for each of several threads, rows that no tile divides, a width that no vector does.
LARGE = {
    "unipelt": Case("unipelt", {"B": 3, "S": 150, "D": 270, "R": 24}, UNIPELT, POOLED),
    "token": Case(
        "token", {"B": 2, "S": 301, "D": 96, "R": 9}, UNIPELT, {**POOLED, "pooling": "token"}
    ),
    "banks": Case("banks", {"B": 5, "S": 90, "D": 64, "R": 16, "M": 3, "M_up": 3}, BANKS),
    "norms": Case(
        "norms",
        {"B": 2, "S": 201, "D": 72, "R": 12},
        f"b_down, b_up, {NORMS_AND_SCALE}",
        {"dropout_p": 0.2},
    ),
    "norm_banks": Case(
        "norm_banks",
        {"B": 5, "S": 90, "D": 72, "R": 12, "M": 3, "M_up": 4},
        f"{BANKS}, {NORM_BANKS}, scale",
        {"dropout_p": 0.2, "activation": "silu"},
    ),
}


def _call(dtype=torch.float32, rank=8, width=16, rows=3):
    x, w = torch.zeros(1, rows, width, dtype=dtype), torch.zeros(rank, width, dtype=dtype)
    values = dict.fromkeys(CONTRACT.input_names)
    values.update(x=x, w_down=w, w_up=w.T.contiguous())
    attributes = make_attributes(CONTRACT, Case("plain", {}))
    return CONTRACT.bind(list(values.values()), attributes)


def test_every_refusal_is_a_sentence(monkeypatch):
    def why_not(*args, **sizes):
        return dispatch.why_not(f"cpu:{isa}", _call(*args, **sizes))

    isa = native.cpu_forms()[0]
    assert why_not() == ""
    assert why_not(torch.bfloat16) == ""
    assert why_not(torch.float16) == "it takes float32 or bfloat16, and x is float16"
    assert why_not(torch.float64) == "it takes float32 or bfloat16, and x is float64"
    assert why_not(rank=1025) == "its tiles hold a bottleneck of at most 1024, and R is 1025"
    assert why_not(rank=64, width=4096, rows=1) == (
        "for 1 rows it would mostly pack weights of D x R = 262144 numbers"
    )
    assert why_not(rank=64, width=4096) == ""
    monkeypatch.setattr(native, "library", lambda name: SimpleNamespace())
    assert why_not().startswith("the compiled module is older than this kernel")


def test_a_refusal_reaches_the_caller():
    x, w = torch.zeros(3, 16, dtype=torch.float16), torch.zeros(4, 16, dtype=torch.float16)
    with pytest.raises(dispatch.BackendError, match=r"'cpu' was asked for but it takes float32"):
        gated_adapter(x, w, w.T.contiguous(), backend="cpu")


@pytest.mark.parametrize("rows", [1, 5, 6, 7, 15, 17, 31, 33, 71, 73, 145])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_rows_around_a_tile(rows, precision, isa, threads, served):
    threads(2)
    sizes = {"B": 1, "S": rows, "D": 40, "R": 8}
    case = Case("rows", sizes, "b_down, b_up", {"activation": "gelu"})
    check(OPERATOR, served(OPERATOR, isa, case, precision), case, precision)


@pytest.mark.parametrize("width", [1, 3, 8, 15, 16, 17, 33, 127, 129, 255, 256, 257, 520])
@pytest.mark.parametrize("precision", ["float32", "bfloat16-master"])
def test_widths_around_vectors_panels_and_stretches(width, precision, isa, served):
    """With an activation that has no kink, at which rounding may take either side."""
    sizes, inputs = {"B": 2, "S": 7, "D": width, "R": 6}, "b_down, b_up"
    inputs = f"{inputs}, {NORMS_AND_SCALE}" if width > 8 else inputs
    case = Case("width", sizes, inputs, {"activation": "gelu"})
    check(OPERATOR, served(OPERATOR, isa, case, precision), case, precision)


@pytest.mark.parametrize("rank", [1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 100])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_ranks_around_vectors_and_blocks(rank, precision, isa, served):
    sizes = {"B": 1, "S": 19, "D": 40, "R": rank}
    case = Case("rank", sizes, "b_down, b_up", {"activation": "gelu"})
    check(OPERATOR, served(OPERATOR, isa, case, precision), case, precision)


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh", "silu", "tanh", "identity"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_activations(activation, precision, isa, served):
    sizes = {"B": 1, "S": 33, "D": 48, "R": 24}
    case = Case("activation", sizes, "b_down, b_up", {"activation": activation})
    check(OPERATOR, served(OPERATOR, isa, case, precision), case, precision)


@pytest.mark.parametrize(
    "value", [-60.0, -1e-30, 0.0, 1e-30, 3e-4, 0.62, 0.64, 0.99, 1.01, 4.1, 90.0]
)
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu", "tanh"])
@pytest.mark.parametrize("precision", ["float32"])
def test_activations_where_their_formulas_change(value, activation, precision, isa, served):
    """By an adapter that is the activation itself; 4 units of rounding of the exact value."""
    sizes = {"B": 1, "S": 1, "D": 8, "R": 8}
    backend = served(OPERATOR, isa, Case("itself", sizes), precision)
    x = torch.full((1, 8), value)
    one = torch.eye(8)
    found = gated_adapter(x, one, one, activation=activation, residual=None, backend=backend)
    exact = gated_adapter(
        x.double(), one.double(), one.double(), activation=activation, residual=None
    )
    assert_close(found, x[:0].sum() + exact.float(), exact, torch.float32, activation)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LARGE)
def test_bits_depend_neither_on_threads_nor_on_the_run(name, precision, isa, served, same_bits):
    backend = served(OPERATOR, isa, LARGE[name], precision)
    same_bits(OPERATOR, backend, LARGE[name], precision, (1, 2, 5))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LARGE)
def test_several_tiles_agree_with_the_reference(name, precision, isa, threads, served):
    threads(3)
    backend = served(OPERATOR, isa, LARGE[name], precision)
    check(OPERATOR, backend, LARGE[name], precision)


def test_a_nan_stays_in_its_row(isa, served):
    x = torch.randn(70, 32).bfloat16()
    x[40, 3] = float("nan")
    backend = served(OPERATOR, isa, Case("nan", {"B": 1, "S": 70, "D": 32, "R": 8}), "bfloat16")
    w = torch.randn(8, 32).bfloat16()
    y = gated_adapter(x, w, w.T.contiguous(), backend=backend)
    assert y[40].isnan().all()
    assert not y[:40].isnan().any()
    assert not y[41:].isnan().any()


@pytest.mark.parametrize("gate", [torch.tensor([0.1, 0.9]), torch.tensor([[0.1] * 40, [0.9] * 40])])
def test_skipped_rows_do_no_work(gate):
    """The skipped sentence's own member of the bank is NaN: only a product could bring it out."""
    x, bank = torch.randn(2, 40, 32), torch.randn(2, 8, 32)
    bank[0] = float("nan")
    y = gated_adapter(
        x,
        bank,
        bank.transpose(1, 2).contiguous(),
        bank_index=torch.tensor([0, 1]),
        gate=gate,
        skip_below=0.5,
        backend="cpu",
    )
    assert torch.equal(y[0], x[0])
    assert y[1].isfinite().all()
    assert not torch.equal(y[1], x[1])


@pytest.mark.parametrize("width", [1, 16, 130, 257])
@pytest.mark.parametrize("rank", [1, 9, 33])
def test_nothing_is_written_beside_results_and_workspace(
    width, rank, isa, threads, served, between_guards
):
    threads(3)
    sizes = {"B": 2, "S": 80, "D": width, "R": rank}
    inputs = f"b_down, b_up, gate_weight, gate_bias, mask, {NORMS_AND_SCALE}"
    attributes = {"pooling": "masked_mean", "dropout_p": 0.1}
    case = Case("guards", sizes, inputs, attributes)
    backend = served(OPERATOR, isa, case, "bfloat16-master")
    with between_guards(at_least=16):
        run(OPERATOR, backend, case, "bfloat16-master")
