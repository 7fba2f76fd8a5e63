"""Runs one case of an operator on one backend and holds outputs and every gradient to the closeness
rule.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from cases import Case, cases_of, make_attributes, make_blanks, make_inputs, module_of, normal
from closeness import assert_close
from torch import Tensor

from pelt_kernels.ops import BACKENDS, OPERATORS
from pelt_kernels.ops import _dispatch as dispatch
from pelt_kernels.ops import _native as native
from pelt_kernels.ops._contract import Signature
from pelt_kernels.ops._dispatch import contract_of

SEED = 1234  # of dropout
# Of inputs, for the error of the baseline where a tensor has few elements. With fewer the largest of
# them still comes out small by chance: one of 24 sweep points of lora_linear failed with 4, where
# both errors have the same mean square over many draws.
OTHER_DRAWS = 8
# float16 and bfloat16 with parameters of the same dtype, and with float32 master parameters.
PRECISIONS = {
    "float32": (torch.float32, False),
    "float16": (torch.float16, False),
    "float16-master": (torch.float16, True),
    "bfloat16": (torch.bfloat16, False),
    "bfloat16-master": (torch.bfloat16, True),
}
# Backends as a request names them: where one has several forms, each is a cell; so on a CPU is each
# instruction set that the processor runs.
CELLS = [
    (o, request)
    for o in OPERATORS
    for b in BACKENDS
    if dispatch.has_file(o, b)
    for request in dispatch.every_request(o, b)
]
# The cases on the short list.
QUICK = [
    (operator, case.id) for operator in OPERATORS for case in cases_of(operator) if case.is_quick
]
# Backends that have to run here, from --require-backend.
REQUIRED: set[str] = set()

Results = dict[
    str, Tensor
]  # outputs by name, gradients by name with a `d` in front; list elements with [i]


def has_true_gradient(operator: str) -> bool:
    """False where a gradient is defined by the method (straight-through, a detached target)."""
    return getattr(module_of(operator), "HAS_TRUE_GRADIENT", True)


def operator_of(operator: str) -> Any:
    """The registered operator, that takes the contract's inputs and attributes."""
    return importlib.import_module(f"pelt_kernels.ops.{operator}")._operator


def device_of(backend: str) -> str:
    """Where a backend's tests run: on the GPU if it serves one and there is one."""
    devices = BACKENDS[dispatch.backend_of(backend)].devices
    return "cuda" if "cuda" in devices and torch.cuda.is_available() else "cpu"


def inputs_of(
    operator: str,
    case: Case,
    precision: str,
    device: str = "cpu",
    draw: int = 0,
    drawn_on: str = "cpu",
) -> list[Any]:
    """The case's inputs in the contract's order."""
    dtype, master = PRECISIONS[precision]
    return make_inputs(contract_of(operator).CONTRACT, case, dtype, device, draw, master, drawn_on)


def why_unavailable(operator: str, backend: str) -> str:
    """Why this backend cannot run here at all: a library, a GPU or a setting is missing. Empty if
    it can.
    """
    backend, device = dispatch.backend_of(backend), device_of(backend)
    if device not in (BACKENDS[backend].devices or (device,)):
        return (
            f"backend {backend} needs a {' or '.join(BACKENDS[backend].devices)} device, and there"
            " is none"
        )
    library = BACKENDS[backend].library
    if library and native.why_not(library):
        return native.why_not(library)
    module = dispatch.implementation(operator, backend)
    return module.unavailable(device) if hasattr(module, "unavailable") else ""


def can_run(operator: str, request: str) -> bool:
    """Does it run here, or has it to? Tests of what has to and does not are there, and fail."""
    return dispatch.backend_of(request) in REQUIRED or not why_unavailable(operator, request)


@cache
def cells(operator: str = "") -> list[tuple[str, str]]:
    """Those of CELLS that can run here or have to; of one operator or of all."""
    return [cell for cell in CELLS if operator in ("", cell[0]) and can_run(*cell)]


def serves(operator: str, request: str, case: Case, precision: str) -> bool:
    """Is there a test of this case: the backend does not refuse it, or has to run and cannot?"""
    is_here = not why_unavailable(operator, request)
    return not (is_here and why_refused(operator, request, case, precision))


def able(operator: str, case: Case, *precisions: str) -> list[str]:
    """What has tests of a case in one of these precisions, or in any."""
    requests = (request for _, request in cells(operator))
    return [
        r for r in requests if any(serves(operator, r, case, p) for p in precisions or PRECISIONS)
    ]


def why_refused(operator: str, backend: str, case: Case, precision: str) -> str:
    """Why this backend refuses this case; empty if it serves it."""
    return dispatch.why_not(backend, call_of(operator, case, precision, device_of(backend)))


def call_of(operator: str, case: Case, precision: str, device: str) -> Signature:
    """What a backend decides by."""
    contract, (dtype, master) = contract_of(operator).CONTRACT, PRECISIONS[precision]
    values = make_blanks(contract, case, dtype, device, master)
    return contract.bind(values, make_attributes(contract, case))


def evaluate(
    operator: str, case: Case, values: Sequence[Any], function: Callable[..., Sequence[Any]]
) -> Results:
    """Public outputs of ``function(values)``, and the gradients of every floating input for a fixed
    random dy.
    """
    contract = contract_of(operator).CONTRACT
    needs_grad = not case.is_inference
    leaves: dict[str, Tensor] = {}

    def leaf(name: str, value: Tensor | None) -> Tensor | None:
        if value is None or not value.is_floating_point() or not needs_grad:
            return value
        leaves[name] = value.detach().requires_grad_()
        return leaves[name]

    values = [
        (
            [leaf(f"d{row.name}[{i}]", v) for i, v in enumerate(value)]
            if row.is_list
            else leaf(f"d{row.name}", value)
        )
        for row, value in zip(contract.input_rows, values)
    ]
    results: Results = {}
    differentiable: list[Tensor] = []
    with torch.set_grad_enabled(needs_grad):
        outputs = function(values)
    for row, output in zip(contract.public_rows, outputs):
        elements = (
            {f"{row.name}[{i}]": v for i, v in enumerate(output)}
            if row.is_list
            else {row.name: output}
        )
        results.update(elements)
        if row.is_differentiable:
            differentiable += elements.values()
    if needs_grad:
        # On the device, where one that is large is not drawn for longer than it is used.
        generator = torch.Generator(differentiable[0].device).manual_seed(99)
        dys = [normal(y.shape, generator).to(_dy_dtype(y)).to(y) for y in differentiable]
        grads = torch.autograd.grad(differentiable, list(leaves.values()), dys, allow_unused=True)
        for (name, value), grad in zip(leaves.items(), grads):
            results[name] = torch.zeros_like(value) if grad is None else grad
    return {name: value.detach() for name, value in results.items()}


def _dy_dtype(y: Tensor) -> torch.dtype:
    """A gradient that every dtype under test can represent, so that the truth sees the same one."""
    return torch.bfloat16 if y.is_floating_point() else y.dtype


def _with_reference(operator: str, case: Case, values: Sequence[Any]) -> Results:
    module = contract_of(operator)
    attributes = dict(zip(module.CONTRACT.attribute_names, make_attributes(module.CONTRACT, case)))
    if module.CONTRACT.has_seed:
        attributes["seed"] = SEED
    return evaluate(operator, case, values, lambda given: module.reference(*given, **attributes))


@lru_cache(maxsize=32)
def expected(
    operator: str, case: Case, precision: str, device: str = "cpu", draw: int = 0
) -> tuple[Results, Results]:
    """Baseline (the dtype) and truth (float64) by the reference, of the case's own inputs."""
    return by_reference(operator, case, inputs_of(operator, case, precision, device, draw))


def by_reference(
    operator: str, case: Case, values: Sequence[Any], true: torch.dtype = torch.float64
) -> tuple[Results, Results]:
    """Baseline and truth of any inputs."""

    def exact(value: Any) -> Any:
        if isinstance(value, list):
            return [exact(v) for v in value]
        return value.to(true) if value is not None and value.is_floating_point() else value

    truth = _with_reference(operator, case, [exact(value) for value in values])
    return _with_reference(operator, case, values), truth


def run(
    operator: str, backend: str, case: Case, precision: str, values: Sequence[Any] | None = None
) -> Results:
    """Outputs and gradients by a backend, through the path that users take; of the case's own
    inputs, or of ``values``.
    """
    attributes = make_attributes(contract_of(operator).CONTRACT, case)
    if values is None:
        values = inputs_of(operator, case, precision, device_of(backend))
    return evaluate(
        operator,
        case,
        values,
        lambda given: operator_of(operator)(given, attributes, SEED, backend),
    )


def check(
    operator: str,
    backend: str,
    case: Case,
    precision: str,
    draw: Callable[[int], Sequence[Any]] | None = None,
    second: str = "",
    true: torch.dtype = torch.float64,
) -> Results:
    """What `run` returns; AssertionError where an output or a gradient is too far. The one place
    where a case is held to the closeness rule: where its baseline is right by chance, as it is for
    a single sum, other draws of the inputs are asked.

    ``draw(n)`` gives the inputs of the n-th draw, where they are not the case's own. ``second`` is a
    backend whose errors are a baseline too. ``true`` is the truth's dtype; float32 takes half of the
    memory, is the truth of 16-bit kernels only, and asks for ``draw``.
    """
    device = device_of(backend)

    @cache
    def drawn(n: int) -> Sequence[Any]:
        return inputs_of(operator, case, precision, device, n) if draw is None else draw(n)

    @cache
    def pair(n: int) -> tuple[Results, Results]:
        if draw is None:
            return expected(operator, case, precision, device, n)
        return by_reference(operator, case, drawn(n), true)

    @cache
    def by_second(n: int) -> Results:
        return run(operator, second, case, precision, drawn(n))

    def others(name: str) -> Iterator[tuple[Tensor, Tensor]]:
        for n in range(1 + OTHER_DRAWS):
            baseline, truth = pair(n)
            if n:
                yield baseline[name], truth[name]
            if second:
                yield by_second(n)[name], truth[name]

    baseline, truth = pair(0)
    found = run(operator, backend, case, precision, drawn(0))
    assert found.keys() == truth.keys()
    for name, value in found.items():
        dtype = PRECISIONS[precision][0]
        assert_close(value, baseline[name], truth[name], dtype, name, others(name))
    return found


def check_in_every_order(
    operator: str,
    backend: str,
    case: Case,
    precision: str,
    draw: Callable[[int], Sequence[Any]] | None = None,
    second: str = "",
    seeds: Sequence[int] = (1, 2),
) -> None:
    """`check` on the simulator under the first order of threads, and the same bits under the others."""
    simulator = native.library("_C_sim")
    simulator.set_seed(seeds[0])
    first = check(operator, backend, case, precision, draw, second)
    values = None if draw is None else draw(0)
    for seed in seeds[1:]:
        simulator.set_seed(seed)
        for name, value in run(operator, backend, case, precision, values).items():
            assert torch.equal(value, first[name]), (
                f"{name}: depends on the order of threads (seed {seed})"
            )
