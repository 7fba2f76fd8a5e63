"""The operators inside torch: opcheck, torch.compile, checkpointing, autocast, autograd's rules."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from cases import case_of, make_attributes
from parity import QUICK, SEED, contract_of, evaluate, inputs_of, operator_of
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from pelt_kernels.ops import (
    OPERATORS,
    LearnedGate,
    LoraBranch,
    Prefix,
    _dispatch,
    gated_adapter,
    lora_linear,
    prefix_attention,
)
from pelt_kernels.ops._contract import Contract
from pelt_kernels.ops._register import Operator, pack
from pelt_kernels.ops._values import flatten, is_given

# The others have no activations either that autocast would cast: a weight, and a loss in float32.
WITH_DROPOUT = [operator for operator in OPERATORS if contract_of(operator).CONTRACT.has_seed]


def with_gradients(value):
    if isinstance(value, list):
        return [with_gradients(v) for v in value]
    return (
        value.detach().requires_grad_()
        if value is not None and value.is_floating_point()
        else value
    )


@pytest.mark.parametrize(("operator", "case_id"), QUICK)
def test_opcheck(operator, case_id):
    case, contract = case_of(operator, case_id), contract_of(operator).CONTRACT
    values = [with_gradients(value) for value in inputs_of(operator, case, "float32")]
    seed = (torch.tensor(SEED),) if contract.has_seed else ()
    opcheck(
        operator_of(operator).fwd,
        (*pack(contract.input_rows, values), *make_attributes(contract, case), *seed, "eager"),
    )


@pytest.mark.parametrize(("operator", "case_id"), QUICK)
def test_a_compiled_call_is_one_graph_with_the_same_numbers(operator, case_id):
    case, op = case_of(operator, case_id), operator_of(operator)
    attributes = make_attributes(contract_of(operator).CONTRACT, case)
    values = inputs_of(operator, case, "float32")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda given: op(given, attributes, SEED, "eager"), fullgraph=True, backend="aot_eager"
    )
    expected = evaluate(operator, case, values, lambda given: op(given, attributes, SEED, "eager"))
    found = evaluate(operator, case, values, compiled)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize(("operator", "case_id"), QUICK)
def test_the_entry_by_name_is_the_operator(operator, case_id, is_compiled):
    """Called with the contract's names, without what has its default."""
    case, contract = case_of(operator, case_id), contract_of(operator).CONTRACT
    attributes = make_attributes(contract, case)
    values = inputs_of(operator, case, "float32")
    changed = {
        row.name: value
        for row, value in zip(contract.attribute_rows, attributes)
        if value != row.default
    } | ({"seed": SEED} if contract.has_seed else {})

    def by_name(given):
        named = {n: v for n, v in zip(contract.input_names, given) if is_given(v)}
        outputs = getattr(torch.ops.pelt_kernels, operator)(**named, **changed, backend="eager")
        return outputs if isinstance(outputs, tuple) else (outputs,)

    op = operator_of(operator)
    expected = evaluate(operator, case, values, lambda given: op(given, attributes, SEED, "eager"))
    torch._dynamo.reset()
    function = torch.compile(by_name, fullgraph=True, backend="aot_eager")
    found = evaluate(operator, case, values, function if is_compiled else by_name)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_the_entry_draws_a_seed_where_none_is_given():
    x, a, b = torch.randn(2, 5, 16), torch.randn(4, 16), torch.randn(16, 4)
    torch.manual_seed(1)
    expected = gated_adapter(x, a, b, dropout_p=0.5)
    torch.manual_seed(1)
    found = [torch.ops.pelt_kernels.gated_adapter(x, a, b, dropout_p=0.5)[0] for _ in range(2)]
    assert torch.equal(found[0], expected) and not torch.equal(found[1], expected)


def test_public_functions_compile_without_a_graph_break():
    x, w_down, w_up, weight = (
        torch.randn(2, 5, 16),
        torch.randn(4, 16),
        torch.randn(16, 4),
        torch.randn(16, 16),
    )
    gate, mask = LearnedGate(torch.randn(16), torch.randn(1)), torch.ones(2, 5, dtype=torch.bool)
    prefix = Prefix(torch.randn(3, 2, 8), torch.randn(3, 2, 8))

    def layer(x):
        y, (g,) = lora_linear(
            x, weight, None, [LoraBranch(w_down, w_up, gate=gate)], extra_gates=[gate], mask=mask
        )
        heads = y.unflatten(-1, (2, 8)).transpose(1, 2)
        y = (
            prefix_attention(heads, heads, heads, [prefix], gate=g, key_mask=mask)
            .transpose(1, 2)
            .flatten(2)
        )
        return gated_adapter(y, w_down, w_up, gate=gate, mask=mask, residual=x)

    torch._dynamo.reset()
    for shape in (x, torch.randn(2, 5, 16)):
        assert torch.equal(
            torch.compile(layer, fullgraph=True, backend="aot_eager")(shape), layer(shape)
        )


def test_gradients_reach_lists_with_absent_elements_under_compile():
    """One prefix from a table and one shared: the list of indices has a tensor and None in it."""
    q = torch.randn(2, 2, 5, 8)
    table, shared, index = torch.randn(3, 4, 2, 8), torch.randn(2, 2, 8), torch.tensor([2, 0])

    def loss(table, shared):
        return (
            prefix_attention(q, q, q, [Prefix(table, table, index), Prefix(shared, shared)])
            .square()
            .sum()
        )

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    given = (table.requires_grad_(), shared.requires_grad_())
    for found, expected in zip(
        torch.autograd.grad(compiled(*given), given),
        torch.autograd.grad(loss(*given), given),
        strict=True,
    ):
        assert expected.abs().max() > 0 and torch.equal(found, expected)


def dropout_calls():
    """Each operator with dropout and no given seed, as functions of one tensor."""
    a, b = torch.randn(4, 16), torch.randn(16, 4)
    prefix = Prefix(torch.randn(3, 2, 8), torch.randn(3, 2, 8))

    def attention(x):
        heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
        return prefix_attention(heads, heads, heads, [prefix], dropout_p=0.5)

    return {
        "gated_adapter": lambda x: gated_adapter(x, a, b, dropout_p=0.5),
        "prefix_attention": attention,
        "lora_linear": lambda x: lora_linear(
            x, torch.eye(16), None, [LoraBranch(a, b)], dropout_p=0.5
        ),
    }


@pytest.mark.parametrize("operator", WITH_DROPOUT)
def test_dropout_draws_its_seed_from_torch(operator):
    call, x = dropout_calls()[operator], torch.randn(2, 5, 16)
    torch.manual_seed(1)
    first, second = call(x), call(x)
    torch.manual_seed(1)
    assert torch.equal(call(x), first) and not torch.equal(first, second)


@pytest.mark.parametrize("operator", WITH_DROPOUT)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_dropout_gives_the_same_gradient(operator, reentrant):
    call, x = dropout_calls()[operator], torch.randn(2, 5, 16, requires_grad=True)
    torch.manual_seed(1)
    (expected,) = torch.autograd.grad(call(x).square().sum(), x)
    torch.manual_seed(1)
    checkpoint(call, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("operator", WITH_DROPOUT)
def test_autocast_computes_in_its_dtype_with_float32_parameters(operator):
    x = torch.randn(2, 5, 16, requires_grad=True)
    a, b = torch.randn(4, 16, requires_grad=True), torch.randn(16, 4, requires_grad=True)

    def call(x, a, b):
        heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
        prefix = Prefix(a.unflatten(-1, (2, 8)), a.unflatten(-1, (2, 8)))
        return {
            "gated_adapter": lambda: gated_adapter(x, a, b),
            "prefix_attention": lambda: prefix_attention(heads, heads, heads, [prefix]),
            "lora_linear": lambda: lora_linear(x, torch.eye(16), None, [LoraBranch(a, b)]),
        }[operator]()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = call(x, a, b)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, call(x.bfloat16(), a, b))
    y.float().sum().backward()
    assert x.grad.dtype == a.grad.dtype == torch.float32 and a.grad.abs().max() > 0


def test_a_frozen_input_gets_no_gradient_and_no_graph_is_built_without_one():
    x, a, b = torch.randn(2, 5, 16), torch.randn(4, 16), torch.randn(16, 4)
    assert not gated_adapter(x, a, b).requires_grad
    y = gated_adapter(x, a.requires_grad_(), b)
    y.sum().backward()
    assert a.grad is not None and b.grad is None
    with torch.no_grad():
        assert not gated_adapter(x, a, b).requires_grad


def test_an_operator_with_one_output_goes_through_torch_too(monkeypatch):
    """torch returns a single output as it is and not in a tuple."""
    contract = Contract(
        name="doubled_in_a_test",
        inputs="x  activation  [T]",
        attributes="",
        outputs="y  activation  differentiable",
        has_seed=False,
        output_shapes=lambda signature: {"y": (signature.sizes["T"],)},
    )
    backend = SimpleNamespace(
        supports=lambda signature, backend, form, needs_grad: "",
        forward=lambda chosen, x: (2 * x,),
        backward=lambda chosen, needs, dy, x: {"x": 2 * dy},
    )
    monkeypatch.setattr(_dispatch, "has_file", lambda operator, name: name == "eager")
    monkeypatch.setattr(_dispatch, "implementation", lambda operator, name: backend)
    operator = Operator(contract, lambda x: (2 * x,))
    x = torch.ones(3, requires_grad=True)
    opcheck(operator.fwd, (x, "eager"))
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: operator((x,), (), 0, "eager")[0], fullgraph=True, backend="aot_eager"
    )
    for function in (compiled, lambda x: operator((x,), (), 0, "eager")[0]):
        y = function(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
        assert torch.equal(y, 2 * x) and torch.equal(dx, torch.full_like(x, 2))


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize(("operator", "case_id"), QUICK)
def test_an_output_can_be_written_in_place(operator, case_id, backend):
    """As in ``y += residual``, which torch refuses for a view that a custom function made."""
    case, contract = case_of(operator, case_id), contract_of(operator).CONTRACT
    values = [with_gradients(value) for value in inputs_of(operator, case, "float32")]
    attributes = make_attributes(contract, case)
    outputs = flatten(operator_of(operator)(values, attributes, SEED, backend))
    written = [y for y in outputs if y.requires_grad]
    assert written
    for y in written:
        y += 1
