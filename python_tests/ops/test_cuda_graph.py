"""Operators inside a CUDA graph: no allocation it cannot capture, no wait for the host."""

from __future__ import annotations

import pytest
import torch
from cases import case_of, make_attributes
from parity import QUICK, SEED, able, contract_of, inputs_of, operator_of

from pelt_kernels.ops._dispatch import backend_of

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

GRAPHED = [
    (operator, backend, name)
    for operator, name in QUICK
    for backend in able(operator, case_of(operator, name), "bfloat16")
    if backend_of(backend) in ("cuda", "triton")
]


@pytest.mark.parametrize(("operator", "backend", "case_id"), GRAPHED)
def test_a_replay_gives_what_a_call_gives(operator, backend, case_id):
    case, contract = case_of(operator, case_id), contract_of(operator).CONTRACT
    attributes = make_attributes(contract, case)
    leaves = []

    def leaf(value):
        if value is None or not value.is_floating_point() or case.is_inference:
            return value
        leaves.append(value.detach().requires_grad_())
        return leaves[-1]

    values = [
        [leaf(v) for v in value] if isinstance(value, list) else leaf(value)
        for value in inputs_of(operator, case, "bfloat16", "cuda")
    ]

    def step():
        outputs = [
            tensor
            for output in operator_of(operator)(values, attributes, SEED, backend)
            for tensor in (output if isinstance(output, list) else [output])
        ]
        trained = [output for output in outputs if output.requires_grad]
        ones = [torch.ones_like(output) for output in trained]
        grads = torch.autograd.grad(trained, leaves, ones, allow_unused=True) if trained else ()
        return outputs + [grad for grad in grads if grad is not None]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and allocates what stays
        for _ in range(3):
            expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for tensor in captured:
        tensor.detach().fill_(float("nan") if tensor.is_floating_point() else 0)
    graph.replay()
    torch.cuda.synchronize()
    for found, truth in zip(captured, expected, strict=True):
        assert torch.equal(found, truth)
