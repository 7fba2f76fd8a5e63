"""Which GPUs the CUDA kernels serve, and what is said where they do not, on GPUs of the simulator."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import parity
import pytest
import torch
from cases import Case, cases_of, make_attributes

from pelt_kernels.ops import (
    OPERATORS,
    BackendError,
    _dispatch,
    _native,
    explain,
    forget_choices,
    symmetric_kl,
)
from pelt_kernels.ops._contract import Signature
from pelt_kernels.ops._values import flatten

pytestmark = pytest.mark.backend("cuda_sim")

TOO_OLD = (
    r"this build holds kernels for compute capability 8\.0; the GPU is T4, compute capability 7\.5"
)
NO_IMAGE = (
    r"this build holds kernels for compute capability 8\.0; the GPU is H200, compute capability 9\.0"
    r" \(cudaErrorNoKernelImageForDevice\)"
)
OLD_DRIVER = r"this build needs a driver for CUDA 1\d\.\d, and the driver is for CUDA 11\.8"


@pytest.fixture
def gpu() -> Iterator[Callable[..., None]]:
    """gpu(name, ...): the simulator stands for this GPU until the test ends."""
    simulator = _native.library("_C_sim")
    forget_choices()
    yield simulator.set_device
    simulator.set_device("H100")
    forget_choices()


@pytest.fixture
def simulated_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The automatic choice asks the simulator first, as it asks CUDA for tensors on a GPU."""
    simulated = {"cuda_sim": _dispatch.replace(_dispatch.BACKENDS["cuda_sim"], is_automatic=True)}
    monkeypatch.setattr(_dispatch, "BACKENDS", simulated | _dispatch.BACKENDS | simulated)


def signature_of(operator: str) -> Signature:
    return parity.call_of(operator, served_case(operator), "bfloat16", "cpu")


def served_case(operator: str) -> Case:
    """One that launches something in both directions."""
    return next(
        case
        for case in cases_of(operator)
        if not case.is_inference
        and case.id != "no_branch"
        and not parity.why_refused(operator, "cuda_sim", case, "bfloat16")
    )


def launches_of(operator: str, request: str) -> dict[str, list[dict[str, Any]]]:
    """Direction -> the launches of a call."""
    simulator, case = _native.library("_C_sim"), served_case(operator)
    contract = parity.contract_of(operator).CONTRACT
    values = parity.inputs_of(operator, case, "bfloat16")
    for value in flatten(values):
        if value is not None and value.is_floating_point():
            value.requires_grad_()
    attributes = make_attributes(contract, case)
    chosen, found = contract.bind(values, attributes).chosen[True], {}
    chosen.clear()  # plans hold sizes that depend on the device
    simulator.start_counting(without_checks=True)
    outputs = parity.operator_of(operator)(values, attributes, parity.SEED, request)
    found["forward"] = simulator.stop_counting()
    simulator.start_counting(without_checks=True)
    outputs[0].sum().backward()
    found["backward"] = simulator.stop_counting()
    chosen.clear()
    return found


def most_shared(launches: list[dict[str, Any]]) -> int:
    return max(launch["shared_bytes"] for launch in launches)


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_call_whose_shared_memory_the_gpu_has_not_is_refused(
    operator: str, gpu: Callable[..., None]
) -> None:
    """By what its launches take, and forward for backward's sake where that follows. With a byte less a
    configuration that takes less may serve it.
    """
    gpu("H100")
    request, signature = _dispatch.every_request(operator, "cuda_sim")[0], signature_of(operator)
    launches = {way: most_shared(found) for way, found in launches_of(operator, request).items()}
    for needs_grad, needed in ((False, launches["forward"]), (True, max(launches.values()))):
        gpu("H100", shared_bytes=needed)
        assert _dispatch.why_not(request, signature, needs_grad) == ""
        gpu("H100", shared_bytes=needed - 1)
        reason = _dispatch.why_not(request, signature, needs_grad)
        if reason:
            assert takes_more(reason, operator, "H100", needed - 1)
        elif needs_grad:
            for found in launches_of(operator, request).values():
                assert most_shared(found) < needed
        gpu("RTX 3090", shared_bytes=256)
        reason = _dispatch.why_not(request, signature, needs_grad)
        assert takes_more(reason, operator, "RTX 3090", 256)


def takes_more(reason: str, operator: str, device: str, limit: int) -> bool:
    """Is it the sentence that a kernel takes more than there is?"""
    found = re.fullmatch(
        rf"a block of {operator}_\w+_sm80 takes (\d+) bytes of shared memory, and {device} has (\d+)",
        reason,
    )
    return found is not None and int(found[1]) > limit == int(found[2])


@pytest.mark.parametrize("device", ["A100", "H100", "H200", "RTX 3090", "RTX 4090", "L4"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_gpu_from_8_0_on_serves_a_small_call_of_every_operator(
    operator: str, device: str, gpu: Callable[..., None]
) -> None:
    gpu(device)
    assert _dispatch.why_not("cuda_sim", signature_of(operator)) == ""


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"name": "T4"}, TOO_OLD),
        ({"name": "H200", "has_image": False}, NO_IMAGE),
        ({"name": "H200", "driver": 11080}, OLD_DRIVER),
    ],
    ids=["too old", "foreign build", "old driver"],
)
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_gpu_that_runs_no_kernel_serves_no_operator(
    operator: str, how: dict[str, Any], said: str, gpu: Callable[..., None]
) -> None:
    signature = signature_of(operator)
    gpu(**how)
    for needs_grad in (False, True):
        reason = _dispatch.why_not("cuda_sim", signature, needs_grad)
        assert re.fullmatch(said, reason), reason
    gpu("H100")
    assert _dispatch.why_not("cuda_sim", signature) == ""


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"name": "T4"}, TOO_OLD),
        ({"name": "H200", "has_image": False}, NO_IMAGE),
        ({"name": "H200", "driver": 11080}, OLD_DRIVER),
        (
            {"name": "RTX 3090", "shared_bytes": 256},
            r"a block of symmetric_kl_fwd_sm80 takes \d+ bytes of shared memory, and RTX 3090 has 256",
        ),
    ],
    ids=["too old", "foreign build", "old driver", "small shared memory"],
)
def test_the_next_backend_serves_and_a_request_is_refused_before_a_launch(
    how: dict[str, Any], said: str, gpu: Callable[..., None], simulated_first: None
) -> None:
    gpu(**how)
    z = torch.randn(7, 1000 + len(said), requires_grad=True)
    symmetric_kl(z, z.detach() + 1).backward()
    (choice,) = explain("symmetric_kl")
    assert choice.backend in ("cpu", "eager") and re.fullmatch(said, choice.refusals["cuda_sim"])
    assert re.search(rf"cuda_sim: {said}", str(choice))
    simulator = _native.library("_C_sim")
    simulator.start_counting()
    try:
        with pytest.raises(BackendError, match=f"'cuda_sim' was asked for but {said}.  Able: "):
            symmetric_kl(z, z.detach() + 1, backend="cuda_sim")
    finally:
        assert simulator.stop_counting() == []


def test_a_gpu_that_serves_is_taken(gpu: Callable[..., None], simulated_first: None) -> None:
    gpu("RTX 4090")
    z = torch.randn(7, 997)
    symmetric_kl(z, z + 1)
    assert [choice.backend for choice in explain("symmetric_kl")] == ["cuda_sim"]
