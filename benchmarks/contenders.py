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
from .timing import FLUSHED, Function, OnSets

SEED: int = parity.SEED  # of dropout
COMPILED = "torch.compile"  # of the reference
MOST_SETS = 16


def inputs_of(operator: str, case: Case, dtype: str, device: str, draw: int = 0) -> list[Any]:
    """What is timed, and before that held to the closeness rule."""
    return parity.inputs_of(operator, case, dtype, device, draw, drawn_on=device)


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
    sets = _sets(inputs_of(operator, case, dtype, device), device)
    forward = {name: _forward(function, sets) for name, function in functions.items()}
    calls = {"forward": forward}
    if not case.is_inference:
        calls["forward+backward"] = {
            name: _forward_backward(operator, function, sets)
            for name, function in functions.items()
        }
    return calls


def _sets(values: list[Any], device: str) -> list[list[Any]]:
    """The values, on a GPU as often again as together they are much larger than its cache."""

    def copy(value: Any) -> Any:
        if isinstance(value, list):
            return [copy(v) for v in value]
        return None if value is None else value.clone()

    if device == "cpu":
        return [values]
    tensors = [v for value in values for v in (value if isinstance(value, list) else [value])]
    size = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    count = min(max(FLUSHED // max(size, 1), 1), MOST_SETS)
    return [values, *([copy(value) for value in values] for _ in range(count - 1))]


def _forward(function: Callable[..., Any], sets: list[list[Any]]) -> Function:
    def call(values: list[Any]) -> None:
        with torch.no_grad():
            function(values)

    return OnSets(call, sets)


def _forward_backward(
    operator: str, function: Callable[..., Any], sets: list[list[Any]]
) -> Function:
    contract = contract_of(operator).CONTRACT

    def call(of: tuple[list[Any], list[Tensor], list[Tensor]]) -> None:
        inputs, leaves, dys = of
        outputs = differentiable(contract, function(inputs))
        if len(dys) != len(outputs):
            dys[:] = [torch.randn_like(output) for output in outputs]
        torch.autograd.grad(outputs, leaves, dys, allow_unused=True)

    return OnSets(call, [(*trainable(operator, values), []) for values in sets])


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
