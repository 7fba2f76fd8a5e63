"""Derivatives beyond an output's gradient: of second order, in forward mode, and several at once; by
kernels where they serve, else by the operator's formula.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import case_of, make_inputs
from closeness import assert_close
from derivatives import BACKENDS, by_backend, check, flat, ones_like, public_calls
from parity import OTHER_DRAWS, QUICK, contract_of, has_true_gradient, inputs_of
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from pelt_kernels.ops import (
    OPERATORS,
    LoraBranch,
    Prefix,
    lora_linear,
    masked_weight,
    prefix_attention,
    symmetric_kl,
)
from pelt_kernels.ops.prefix_attention.weights import attention_weights

# Small enough for differences in float64, and with every kind of input and option among them.
DIFFERENCES = [
    *(("gated_adapter", id) for id in ("plain", "vlm", "hyperpelt", "dropout", "one_row")),
    *(("lora_linear", id) for id in ("extra_gates_only", "overlapping", "width_odd")),
    ("prefix_attention", "no_rows"),
]


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)


def second_derivatives(function, inputs):
    """Of Σ(gradient)² + Σ input, so that another path reaches every input, and a lost term would be
    silent.
    """
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = function(*leaves)
    grads = torch.autograd.grad(
        outputs, leaves, [y.detach() for y in outputs], create_graph=True, materialize_grads=True
    )
    total = sum(g.square().sum() for g in grads) + sum(leaf.sum() for leaf in leaves)
    return [*(g.detach() for g in grads), *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("operator", "case_id"), QUICK)
def test_second_derivatives_are_the_formulas(operator, case_id, backend):
    case = case_of(operator, case_id)
    function = by_backend(operator, case, backend)
    found = second_derivatives(*flat(operator, inputs_of(operator, case, "float32"), function))
    check(operator, case, second_derivatives, found)


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_mode_that_counts_operations_loses_no_term(operator):
    case = case_of(operator, next(id for o, id in QUICK if o == operator))
    values = inputs_of(operator, case, "float32")
    function, inputs = flat(operator, values, by_backend(operator, case, "eager"))
    expected = second_derivatives(function, inputs)
    with FlopCounterMode(display=False):
        found = second_derivatives(function, inputs)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(("operator", "case_id"), DIFFERENCES)
def test_every_derivative_in_float64_is_the_limit_of_differences(operator, case_id):
    """Reverse and forward mode, one gradient and several at once, first and second order."""
    case, module = case_of(operator, case_id), contract_of(operator)
    values = make_inputs(module.CONTRACT, case, torch.float64)
    function, inputs = flat(operator, values, by_backend(operator, case, None))
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    assert has_true_gradient(operator)
    torch.autograd.gradcheck(
        function, leaves, fast_mode=True, check_forward_ad=True, check_batched_grad=True,
        check_batched_forward_grad=True,
    )  # fmt: skip
    torch.autograd.gradgradcheck(
        function, leaves, fast_mode=True, check_batched_grad=True, check_fwd_over_rev=True
    )


@pytest.mark.parametrize(("operator", "case_id"), QUICK)
def test_forward_mode_is_the_gradient_times_the_direction(operator, case_id):
    case = case_of(operator, case_id)
    values = inputs_of(operator, case, "float32")
    function, inputs = flat(operator, values, by_backend(operator, case, None))
    directions = [torch.randn_like(tensor) for tensor in inputs]

    def tangents(function, inputs):
        given = [d.to(tensor) for d, tensor in zip(directions, inputs)]
        return torch.func.jvp(function, tuple(inputs), tuple(given))[1]

    check(operator, case, tangents, tangents(function, inputs))
    for is_grad_enabled in (True, False):
        with forward_ad.dual_level(), torch.set_grad_enabled(is_grad_enabled):
            duals = [forward_ad.make_dual(x, d) for x, d in zip(inputs, directions)]
            found = [forward_ad.unpack_dual(y).tangent for y in function(*duals)]
        check(operator, case, tangents, found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_gradient_has_a_tangent_where_its_direction_has_one(operator, backend):
    """A gradient is linear in the direction it is given, so its tangent is the gradient itself."""
    case = case_of(operator, next(id for o, id in QUICK if o == operator))
    values = inputs_of(operator, case, "float32")
    function, inputs = flat(operator, values, by_backend(operator, case, backend))
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = function(*leaves)
    with forward_ad.dual_level():
        dys = [forward_ad.make_dual(torch.zeros_like(y), torch.ones_like(y)) for y in outputs]
        found = [
            forward_ad.unpack_dual(grad).tangent
            for grad in torch.autograd.grad(outputs, leaves, dys, allow_unused=True)
        ]
    assert found[0] is not None

    def gradients(function, inputs):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        outputs = function(*leaves)
        return torch.autograd.grad(outputs, leaves, ones_like(outputs), materialize_grads=True)

    found = [torch.zeros_like(x) if t is None else t for x, t in zip(inputs, found)]
    check(operator, case, gradients, found)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_several_gradients_at_once_are_those_one_by_one(operator, backend):
    for case in (case_of(o, id) for o, id in QUICK if o == operator):
        values = inputs_of(operator, case, "float32")
        function, inputs = flat(operator, values, by_backend(operator, case, backend))
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        outputs = function(*leaves)
        dys = [torch.randn(3, *y.shape) for y in outputs]
        for create_graph in (False, True):
            found = torch.autograd.grad(
                outputs, leaves, dys, retain_graph=True, create_graph=create_graph,
                is_grads_batched=True, allow_unused=True,
            )  # fmt: skip
            for n in range(3):
                expected = torch.autograd.grad(
                    outputs, leaves, [dy[n] for dy in dys], retain_graph=True,
                    create_graph=create_graph, allow_unused=True,
                )  # fmt: skip
                for each, one in zip(found, expected, strict=True):
                    assert (each is None and one is None) or torch.equal(each[n], one)
        gradient = partial(torch.autograd.grad, outputs, leaves, allow_unused=True)
        over_vmap = torch.func.vmap(lambda *dys, g=gradient: g(dys))(
            *(torch.stack([torch.zeros_like(y), y.detach()]) for y in outputs)
        )

        def gradients(function, inputs):
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            outputs = function(*leaves)
            dys = [y.detach() for y in outputs]
            return torch.autograd.grad(outputs, leaves, dys, materialize_grads=True)

        check(operator, case, gradients, [grad[1] for grad in over_vmap])


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_vectorized_jacobian_is_the_one_row_by_row(operator):
    call, x = public_calls()[operator], torch.randn(1, 2, 16)

    def some(x):
        return call(x).flatten()[:3]

    rows = torch.autograd.functional.jacobian(some, x)
    assert torch.equal(torch.autograd.functional.jacobian(some, x, vectorize=True), rows)
    columns = torch.autograd.functional.jacobian(some, x, vectorize=True, strategy="forward-mode")
    exact = public_calls(torch.float64)[operator]
    truth = torch.autograd.functional.jacobian(lambda x: exact(x).flatten()[:3], x.double())
    assert_close(columns, rows, truth, torch.float32, operator)


def test_a_straight_through_mask_is_so_at_every_order():
    """With G the gradient of the result, dw0 = G ⊙ (mask + |W|); of Σ dw0 the mask's own gradient
    and |W|'s are both sign(W).
    """
    w0 = torch.tensor([[1.0, -2.0], [3.0, -0.5]], requires_grad=True)
    zeros = [torch.zeros(2, 1), torch.zeros(1, 2), torch.zeros(2, 1), torch.zeros(1, 2)]
    for backend in BACKENDS:
        y = masked_weight(w0, *zeros, torch.zeros(2), torch.zeros(2), 2, backend=backend)
        (grad,) = torch.autograd.grad(y.sum(), w0, create_graph=True)
        assert torch.equal(grad, torch.tensor([[1.0, 3.0], [4.0, 0.5]]))
        assert torch.equal(torch.autograd.grad(grad.sum(), w0)[0], 2 * w0.detach().sign())


def test_a_target_is_a_constant_at_every_order():
    """dz1 = (p1 - p2) / 2 with p2 a constant: its own derivative is that of p1 alone."""
    z1, z2 = (torch.randn(1, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    (grad,) = torch.autograd.grad(symmetric_kl(z1, z2), z1, create_graph=True)
    found = torch.autograd.grad(grad[0, 0], [z1, z2], allow_unused=True)
    p = z1.detach().softmax(-1)[0]
    expected = 0.5 * p[0] * (torch.eye(3, dtype=torch.float64)[0] - p)
    assert_close(found[0][0], expected, expected, torch.float64, "dz1")
    assert found[1] is None or not found[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_learned_factor_has_its_gradient(dtype):
    """A tensor instead of a number: the same value, and a gradient."""
    x, w, a, b = (torch.randn(s).to(dtype) for s in ((2, 5, 16), (12, 16), (4, 16), (12, 4)))
    q, p = torch.randn(2, 2, 5, 8).to(dtype), torch.randn(3, 2, 8).to(dtype)
    factors = [0.1 * torch.randn(s).to(dtype) for s in ((12, 2), (2, 16), (12, 3), (3, 16))]
    sides = torch.randn(12).to(dtype), torch.randn(16).to(dtype)
    calls = {
        "prefix_attention": lambda s: prefix_attention(q, q, q, [Prefix(p, p)], scale=s),
        "lora_linear": lambda s: lora_linear(x, w, None, [LoraBranch(a, b, scale=s)]),
        "weights": lambda s: attention_weights(q, q, [Prefix(p, p)], scale=s),
        "beta": lambda s: masked_weight(w, *factors, *sides, 99, beta=s),
        "alpha1": lambda s: masked_weight(w, *factors, *sides, 99, alpha1=s),
        "alpha2": lambda s: masked_weight(w, *factors, *sides, 99, alpha2=s),
    }
    for name, call in calls.items():
        scale = torch.tensor(0.5, requires_grad=True)
        y = call(scale)
        assert torch.equal(y, call(0.5)), name  # a power of 2 costs no digit
        (grad,) = torch.autograd.grad(y.float().square().sum(), scale)
        assert grad.dtype == torch.float32 and grad.abs() > 0, name
        with pytest.raises(ValueError, match=r"a number or a tensor \[\], got \[2\]"):
            call(torch.ones(2))


def test_the_gradient_of_a_learned_factor_is_the_formulas():
    x, w, a, b = (torch.randn(s) for s in ((2, 5, 16), (12, 16), (4, 16), (12, 4)))
    q, p = torch.randn(2, 2, 5, 8), torch.randn(3, 2, 8)
    scale = torch.tensor(0.7, requires_grad=True)

    def attention(q, p, scale):
        return prefix_attention(q, q, q, [Prefix(p, p)], scale=scale)

    def linear(x, w, a, b, scale):
        return lora_linear(x, w, None, [LoraBranch(a, b, scale=scale)])

    def attention_formula(q, p, scale):
        keys = torch.cat([p.transpose(0, 1)[None].expand(2, -1, -1, -1), q], dim=2)
        return (scale * q @ keys.transpose(-1, -2)).softmax(-1) @ keys

    def linear_formula(x, w, a, b, scale):
        return x @ w.T + scale * (x @ a.T) @ b.T

    for call, formula, given in (
        (attention, attention_formula, (q, p, scale)),
        (linear, linear_formula, (x, w, a, b, scale)),
    ):

        def derivative(f, values):
            return torch.autograd.grad(f(*values).square().sum(), values[-1])[0]

        def pair(tensors, f=formula):
            in_double = [t.detach().double().requires_grad_() for t in tensors]
            return derivative(f, tensors), derivative(f, in_double)

        # A single sum is right by chance, so the baseline's error is that of several.
        others = ([*(torch.randn_like(t) for t in given[:-1]), scale] for _ in range(OTHER_DRAWS))
        found = derivative(call, given)
        assert_close(found, *pair(given), torch.float32, formula.__name__, map(pair, others))
