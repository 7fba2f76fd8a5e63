"""Operators under what has to see each operation: transforms of torch.func, torch.jit.trace, and
both inside torch.compile. Right, or refused in a sentence.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import case_of
from closeness import assert_close
from derivatives import by_backend, check, flat, ones_like, public_calls
from parity import QUICK, inputs_of
from torch.autograd import forward_ad

from pelt_kernels.ops import (
    OPERATORS,
    BackendError,
    LearnedGate,
    LoraBranch,
    explain,
    forget_choices,
    gated_adapter,
    lora_linear,
    prefix_attention,
    symmetric_kl,
)


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)


@pytest.mark.parametrize(("operator", "case_id"), QUICK)
def test_transforms_of_torch_func(operator, case_id):
    """grad, vmap over it, and the derivative of it: forward over reverse."""
    case = case_of(operator, case_id)
    values = inputs_of(operator, case, "float32")
    function, inputs = flat(operator, values, by_backend(operator, case, None))
    arguments = tuple(range(len(inputs)))

    def gradients(function, inputs):
        def total(*tensors):
            return sum(y.square().sum() for y in function(*tensors))

        grads = torch.func.grad(total, arguments)
        hessian_product = torch.func.jvp(grads, tuple(inputs), tuple(ones_like(inputs)))[1]
        return [*grads(*inputs), *hessian_product]

    check(operator, case, gradients, gradients(function, inputs))

    def of_the_second_sample(function, inputs):
        def total(*tensors):
            return sum(y.square().sum() for y in function(*tensors))

        samples = [torch.stack([torch.zeros_like(x), x, x / 2]) for x in inputs]
        return [grad[1] for grad in torch.func.vmap(torch.func.grad(total, arguments))(*samples)]

    found = of_the_second_sample(function, inputs)
    check(operator, case, lambda *given: gradients(*given)[: len(found)], found)


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_trace_is_the_function_at_other_sizes_too(operator):
    call, x = public_calls()[operator], torch.randn(2, 5, 16)
    with warnings.catch_warnings():
        # Sizes that torch reads as numbers, and Python's own comparisons of them.
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        traced = torch.jit.trace(call, (x,))
    for shape in ((2, 5, 16), (3, 5, 16), (1, 8, 16), (4, 1, 16)):
        other = torch.randn(shape)
        truth = public_calls(torch.float64)[operator](other.double())
        baseline = torch.func.vmap(call)(other[None])[0]  # the formula
        assert_close(traced(other), baseline, truth, torch.float32, operator)


@pytest.mark.parametrize(("operator", "case_id"), QUICK)
def test_a_trace_holds_every_option(operator, case_id):
    case = case_of(operator, case_id)
    values = inputs_of(operator, case, "float32")
    function, inputs = flat(operator, values, by_backend(operator, case, None))
    traced = torch.jit.trace(function, tuple(inputs))
    others = [tensor.flip(0) if tensor.ndim else tensor for tensor in inputs]

    def outputs(function, inputs):
        return function(*(x.flip(0) if x.ndim else x for x in inputs))

    found = traced(*others)
    check(operator, case, outputs, found if isinstance(found, tuple) else (found,))


def dropout_calls():
    """Each operator with dropout and no given seed, as a function of one tensor."""
    a, b, w = torch.randn(4, 16), torch.randn(16, 4), torch.randn(16, 16)

    def attention(x):
        heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
        return prefix_attention(heads, heads, heads, dropout_p=0.5)

    return {
        "gated_adapter": lambda x: gated_adapter(x, a, b, dropout_p=0.5),
        "prefix_attention": attention,
        "lora_linear": lambda x: lora_linear(x, w, None, [LoraBranch(a, b)], dropout_p=0.5),
    }


@pytest.mark.parametrize("operator", dropout_calls())
def test_dropout_under_transforms_draws_as_torchs_own(operator):
    call, x = dropout_calls()[operator], torch.randn(2, 5, 16)
    samples = torch.stack([x, x])
    same = torch.func.vmap(call, randomness="same")(samples)
    assert torch.equal(same[0], same[1])
    torch.manual_seed(1)
    found = torch.func.vmap(call, randomness="same")(samples)[0]
    torch.manual_seed(1)
    assert torch.equal(found == 0, call(x) == 0)
    different = torch.func.vmap(call, randomness="different")(samples)
    assert not torch.equal(different[0], different[1])
    with pytest.raises(RuntimeError, match="randomness"):
        torch.func.vmap(call)(samples)
    traced = torch.jit.trace(call, (x,), check_trace=False)
    assert not torch.equal(traced(x), traced(x))
    torch.manual_seed(1)
    found = traced(x)
    torch.manual_seed(1)
    assert torch.equal(found == 0, call(x) == 0)


def transformed(call, x):
    """An operator's call where a backend cannot serve it."""
    return {
        "torch.func": lambda: torch.func.vmap(call)(x[None]),
        "torch.jit.trace": lambda: torch.jit.trace(call, (x,)),
    }


@pytest.mark.parametrize("what", ["torch.func", "torch.jit.trace"])
def test_a_backend_asked_for_by_name_is_refused_and_not_replaced(what):
    x, a, b = torch.randn(2, 5, 16), torch.randn(4, 16), torch.randn(16, 4)
    with pytest.raises(BackendError, match=f"'cpu' was asked for but {what} .*  Able: eager"):
        transformed(lambda x: gated_adapter(x, a, b, backend="cpu"), x)[what]()
    transformed(lambda x: gated_adapter(x, a, b, backend="eager"), x)[what]()


def test_forward_mode_refuses_a_backend_asked_for_by_name():
    x, a, b = torch.randn(2, 5, 16), torch.randn(4, 16), torch.randn(16, 4)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        with pytest.raises(BackendError, match="forward-mode differentiation goes through PyTorch"):
            gated_adapter(dual, a, b, backend="cpu")
        # Without a tangent there is nothing to carry.
        assert torch.equal(gated_adapter(x, a, b, backend="cpu"), gated_adapter(x, a, b))


def test_explain_tells_of_the_formula():
    x, a, b = torch.randn(2, 5, 16, requires_grad=True), torch.randn(4, 16), torch.randn(16, 4)
    forget_choices()
    torch.autograd.grad(gated_adapter(x, a, b).sum(), x, create_graph=True)
    torch.func.vmap(lambda x: gated_adapter(x, a, b))(x.detach()[None])
    told = [choice for choice in explain("gated_adapter") if choice.form == "formula"]
    assert [choice.served for choice in told] == ["eager:formula"] * 2
    assert "create_graph=True asks for" in str(told[0]) and "torch.func" in str(told[1])


def test_a_wrong_call_is_refused_under_transforms_as_without():
    x, bank, up = torch.randn(3, 2, 5, 16), torch.randn(2, 4, 16), torch.randn(16, 4)
    index = torch.tensor([0, 1, 2])

    def call(x, index):
        return gated_adapter(x, bank, up, bank_index=index)

    torch.func.vmap(call)(x, index.clamp(max=1))
    with pytest.raises(ValueError, match=r"expected down_index in \[0, 2\).* from 0 to 2"):
        torch.func.vmap(call)(x, index)
    with pytest.raises(ValueError, match=r"expected w_up\[D, R\]"):
        torch.func.vmap(lambda x: gated_adapter(x, bank[0], bank[0]))(x)


def test_what_carries_no_gradient_carries_none_under_transforms():
    x, a, b = torch.randn(2, 5, 16), torch.randn(4, 16), torch.randn(16, 4)
    gate = LearnedGate(torch.randn(16), torch.randn(1), "mean")

    def gate_value(x):
        return gated_adapter(x, a, b, gate=gate, return_gate=True)[1]

    value, tangent = torch.func.jvp(gate_value, (x,), (x,))
    assert value.shape == (2,) and not tangent.any()
    q = x.unflatten(-1, (2, 8)).transpose(1, 2)
    lse = torch.func.grad(lambda q: prefix_attention(q, q, q, return_lse=True)[1].sum())(q)
    assert not lse.any()


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_compiled_call_keeps_the_promises(operator):
    x, v = torch.randn(2, 5, 16), torch.randn(2, 5, 16)

    def second(f):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(f(leaf).square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(grad.square().sum() + leaf.sum(), leaf)[0]

    def dual(f):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent

    call = public_calls()[operator]
    grads = torch.func.vmap(torch.func.grad(lambda x: call(x).square().sum()))
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    compiled(x)
    assert torch.equal(second(compiled), second(call))
    assert torch.equal(dual(compiled), dual(call))
    within = torch.compile(lambda x: grads(x[None]), fullgraph=True, backend="eager")
    assert torch.equal(within(x), grads(x[None]))


def test_a_graph_that_holds_an_operator_refuses_tangents():
    class Loss(torch.nn.Module):
        def forward(self, x):
            return symmetric_kl(x, x.cos())

    x = torch.randn(4, 3)
    exported = torch.export.export(Loss(), (x,)).module()
    assert torch.equal(exported(x), Loss()(x))
    with pytest.raises(NotImplementedError, match="symmetric_kl: expected no forward-mode"):
        torch.func.jvp(exported, (x,), (x,))
