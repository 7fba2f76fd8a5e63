"""Indices: no value reaches a kernel unchecked, however the operator is called and whatever is
written into an index meanwhile.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from cases import case_of, make_attributes
from parity import SEED, contract_of, inputs_of, operator_of, why_unavailable

from pelt_kernels.ops import LoraBranch, Prefix, gated_adapter, lora_linear, prefix_attention
from pelt_kernels.ops._register import pack
from pelt_kernels.ops._triton_host import within_bounds

FAR = 10**9
# A case with an index of each operator, and the index's name.
INDEXED = [
    ("gated_adapter", "bank_per_sample", "down_index"),
    ("gated_adapter", "norm_banks", "up_index"),
    ("lora_linear", "bank_per_sample", "a_index"),
    ("prefix_attention", "control_prefixes", "prefix_index"),
    ("prefix_attention", "lengths", "lengths"),
]


def refilled(index, how):
    """Writes what is far outside into an index, without torch's notice."""
    if how == "data":
        index.data.fill_(FAR)
    else:
        index.numpy()[...] = FAR


def calls(index):
    """Each operator on a bank, as a function of its first input, and that input's shape."""
    torch.manual_seed(0)
    w, v, weight = torch.randn(3, 4, 16), torch.randn(3, 16, 4), torch.randn(16, 16)
    table = torch.randn(3, 5, 2, 8)

    def attention(x, backend):
        q = x.unflatten(-1, (2, 8)).transpose(1, 2)
        return prefix_attention(q, q, q, [Prefix(table, table, index)], backend=backend)

    return {
        "gated_adapter": lambda x, backend: gated_adapter(
            x, w, v, bank_index=index, backend=backend
        ),
        "lora_linear": lambda x, backend: lora_linear(
            x, weight, None, [LoraBranch(w, v, bank_index=index)], backend=backend
        ),
        "prefix_attention": attention,
        "lengths": lambda x, backend: prefix_attention(
            x[:, None], x[:, None], x[:, None], lengths=index, backend=backend
        ),
    }


@pytest.mark.parametrize("how", ["data", "numpy"])
@pytest.mark.parametrize("is_compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("call", ["gated_adapter", "lora_linear", "prefix_attention", "lengths"])
def test_an_index_refilled_before_backward_changes_nothing(call, backend, is_compiled, how, need):
    need(backend, why_unavailable(call.replace("lengths", "prefix_attention"), backend))
    index = torch.from_numpy(np.array([0, 2]))
    function = calls(index)[call]
    x = torch.randn(2, 5, 16, requires_grad=True)
    (expected,) = torch.autograd.grad(function(x, backend).square().sum(), x)
    if is_compiled:
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    y = function(x, backend).square().sum()
    refilled(index, how)
    assert torch.equal(torch.autograd.grad(y, x)[0], expected)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("value", [-1, FAR])
@pytest.mark.parametrize("call", ["gated_adapter", "lora_linear", "prefix_attention", "lengths"])
def test_a_compiled_call_checks_the_index_of_each_run(call, backend, value, need):
    operator = call.replace("lengths", "prefix_attention")
    need(backend, why_unavailable(operator, backend))
    index = torch.tensor([0, 2])
    torch._dynamo.reset()
    compiled = torch.compile(calls(index)[call], fullgraph=True, backend="aot_eager")
    compiled(torch.randn(2, 5, 16), backend)
    index[1] = value
    with pytest.raises(ValueError, match=rf"{operator}: expected .* in \[0, .*, got values from"):
        compiled(torch.randn(2, 5, 16), backend)


def by_hand(operator, case_id, backend):
    """The arguments of an operator's forward and backward as torch lists them."""
    case, contract = case_of(operator, case_id), contract_of(operator).CONTRACT
    values = inputs_of(operator, case, "float32")
    attributes = make_attributes(contract, case)
    seed = (torch.tensor(SEED),) if contract.has_seed else ()
    op = operator_of(operator)
    outputs = op.fwd(*pack(contract.input_rows, values), *attributes, *seed, backend)
    named = {
        **{f"d{r.name}": o for r, o in zip(contract.output_rows, outputs) if r.is_differentiable},
        **{r.name: o for r, o in zip(contract.output_rows, outputs) if r.is_saved},
    }
    needs = [False] * len(contract.backward_names)
    needs[0] = True
    rest = (*attributes, *seed, backend)

    def forward(values):
        return op.fwd(*pack(contract.input_rows, values), *rest)

    def backward(values, named=named, needs=needs):
        rows = [row for row in contract.input_rows if not row.grad_is_dy]
        kept = [v for v, row in zip(values, contract.input_rows) if not row.grad_is_dy]
        return op.bwd(*named.values(), needs, *pack(rows, kept), *rest)

    return contract, values, named, forward, backward


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize(("operator", "case_id", "name"), INDEXED)
def test_operators_called_by_hand_check_too(operator, case_id, name, backend, need):
    need(backend, why_unavailable(operator, backend))
    contract, values, named, forward, backward = by_hand(operator, case_id, backend)
    assert len(backward(values)) == 1
    wrong = list(values)
    place = contract.input_names.index(name)
    is_list = isinstance(values[place], list)
    far = torch.full_like(values[place][0] if is_list else values[place], FAR)
    wrong[place] = [far, *values[place][1:]] if is_list else far
    for call in (forward, backward):
        with pytest.raises(ValueError, match=rf"^{operator}: expected {name}.* in \[0, "):
            call(wrong)
    for key, value in ((key, value) for key, value in named.items() if len(value)):
        less = value[:-1] if isinstance(value, list) else value[..., :-1].double()
        with pytest.raises(ValueError, match=rf"^{operator}: expected .*{key}"):
            backward(values, {**named, key: less})
    with pytest.raises(ValueError, match=rf"^{operator}: expected .* elements of needs"):
        backward(values, needs=[True])


def everywhere(index, value):
    """An index, or each of a list, with this value in the place of its own."""
    if isinstance(index, list):
        return [everywhere(i, value) for i in index]
    return None if index is None else torch.full_like(index, value)


@pytest.mark.backend("cuda_sim")
@pytest.mark.parametrize("far", [-FAR * FAR, -1, FAR * FAR])
@pytest.mark.parametrize(("operator", "case_id", "name"), INDEXED)
def test_kernels_of_a_gpu_stay_inside_the_bank(operator, case_id, name, far, monkeypatch):
    """On a GPU nobody checks an index: it is clamped where it is read. The simulator refuses any read
    beside the bank.
    """
    case, contract = case_of(operator, case_id), contract_of(operator).CONTRACT
    values = inputs_of(operator, case, "bfloat16")
    place, attributes = contract.input_names.index(name), make_attributes(contract, case)
    row = contract.input_rows[place]
    sizes = contract.bind(values, attributes).sizes[row.bound]
    last = (max(sizes) if isinstance(sizes, tuple) else sizes) - 1 + row.includes_bound
    monkeypatch.setattr(type(contract), "check_indices", lambda *args: None)

    def run(index):
        inputs = [*values[:place], everywhere(values[place], index), *values[place + 1 :]]
        inputs = [
            v.clone().requires_grad_() if torch.is_tensor(v) and v.is_floating_point() else v
            for v in inputs
        ]
        y, *_ = operator_of(operator)(inputs, attributes, SEED, "cuda_sim")
        y.float().square().sum().backward()
        return [y, *(v.grad for v in inputs if torch.is_tensor(v) and v.requires_grad)]

    for found, expected in zip(run(far), run(0 if far < 0 else last), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("far", [-FAR, FAR])
@pytest.mark.parametrize(("operator", "case_id", "name"), INDEXED)
def test_triton_gets_indices_inside_the_bank(operator, case_id, name, far):
    case, contract = case_of(operator, case_id), contract_of(operator).CONTRACT
    inputs = dict(zip(contract.input_names, inputs_of(operator, case, "float32")))
    signature = contract.bind(list(inputs.values()), make_attributes(contract, case))
    assert within_bounds(signature, inputs) is inputs
    on_gpu = copy.copy(signature)
    on_gpu.device = torch.device("cuda")
    found = within_bounds(on_gpu, inputs | {name: everywhere(inputs[name], far)})[name]
    row = contract.input_rows[contract.input_names.index(name)]
    found, given, bound = (
        value if row.is_list else [value]
        for value in (found, inputs[name], signature.sizes[row.bound])
    )
    # One that has no bank keeps its place; the sizes end with the last bank.
    assert [index is None for index in found] == [index is None for index in given]
    for index, size in zip(found, bound):
        assert index is None or index.eq(0 if far < 0 else size - 1 + row.includes_bound).all()
