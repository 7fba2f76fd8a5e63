"""What is timed: the reference, torch.compile of it, peers and backends, each as its own call."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pelt_kernels.ops._dispatch import contract_of

from . import shapes
from .from_tests import Case, cases, parity
from .timing import Function

SEED: int = parity.SEED  # of dropout
COMPILED = "torch.compile"  # of the reference


def contenders(
    operator: str,
    case: Case,
    dtype: str,
    device: str,
    requests: Sequence[str],
    baselines: Sequence[str],
) -> dict[str, dict[str, Function]]:
    """Direction -> contender -> a call without arguments. A request names a backend as users do,
    and the empty one is the dispatch's own choice.
    """
    module = contract_of(operator)
    attributes = cases.make_attributes(module.CONTRACT, case)
    named = dict(zip(module.CONTRACT.attribute_names, attributes))
    if module.CONTRACT.has_seed:
        named["seed"] = SEED
    functions: dict[str, Callable[..., Any]] = {}
    others = {"reference": module.reference, **peers_of(operator, case)}
    for name in baselines:
        if name == COMPILED:
            others[name] = torch.compile(module.reference, dynamic=False)
        other = others[name]
        functions[name] = lambda values, other=other: other(*values, **named)
    for request in requests:
        functions[request] = lambda values, request=request: parity.operator_of(operator)(
            values, attributes, SEED, request or None
        )
    values = parity.inputs_of(operator, case, dtype, device)
    forward = {name: _forward(function, values) for name, function in functions.items()}
    calls = {"forward": forward}
    if not case.is_inference:
        calls["forward+backward"] = {
            name: _forward_backward(operator, function, values)
            for name, function in functions.items()
        }
    return calls


def _forward(function: Callable[..., Any], values: list[Any]) -> Function:
    def call() -> None:
        with torch.no_grad():
            function(values)

    return call


def _forward_backward(operator: str, function: Callable[..., Any], values: list[Any]) -> Function:
    contract = contract_of(operator).CONTRACT
    inputs, leaves = trainable(operator, values)
    dys: list[Tensor] = []

    def call() -> None:
        outputs = differentiable(contract, function(inputs))
        if len(dys) != len(outputs):
            dys[:] = [torch.randn_like(output) for output in outputs]
        torch.autograd.grad(outputs, leaves, dys, allow_unused=True)

    return call


def trainable(operator: str, values: list[Any]) -> tuple[list[Any], list[Tensor]]:
    """The inputs, and those of their tensors that ask for a gradient: all that is not frozen."""
    leaves: list[Tensor] = []

    def leaf(name: str, value: Tensor | None) -> Tensor | None:
        if value is None or not value.is_floating_point():
            return value
        if name in shapes.FROZEN.get(operator, ()):
            return value.detach()
        leaves.append(value.detach().requires_grad_())
        return leaves[-1]

    inputs = [
        [leaf(row.name, v) for v in value] if row.is_list else leaf(row.name, value)
        for row, value in zip(contract_of(operator).CONTRACT.input_rows, values)
    ]
    return inputs, leaves


def differentiable(contract: Any, outputs: Sequence[Any]) -> list[Tensor]:
    """The tensors among a call's outputs from which gradients come."""
    return [
        tensor
        for row, output in zip(contract.public_rows, outputs)
        if row.is_differentiable
        for tensor in (output if row.is_list else [output])
    ]


def baselines_of(operator: str, case: Case) -> list[str]:
    """Everything that this case can be timed against."""
    return ["reference", COMPILED, *peers_of(operator, case)]


def peers_of(operator: str, case: Case) -> dict[str, Callable[..., Any]]:
    """The other implementations that serve this case, by name."""
    if importlib.util.find_spec(f"benchmarks.peers.{operator}") is None:
        return {}
    module = importlib.import_module(f"benchmarks.peers.{operator}")
    return {name: peer for name, peer in module.PEERS.items() if module.serves(name, case)}
