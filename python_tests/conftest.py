"""Options and settings of the whole test suite."""

from __future__ import annotations

import os
import re
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import parity
import pytest
import torch
from cases import Case

from pelt_kernels.ops import BACKENDS, OPERATORS
from pelt_kernels.ops import _dispatch as dispatch
from pelt_kernels.ops import _native as native

# An sdist tells what it is of in its root, as a package does once it is installed.
IS_SDIST = (Path(__file__).resolve().parents[1] / "PKG-INFO").is_file()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-backend",
        default="",
        metavar="NAMES",
        help=(
            "backends that have to be there, with commas: where one cannot run, its tests fail"
            " instead of not being there"
        ),
    )
    parser.addoption(
        "--cuda-module",
        metavar="FILE",
        help="a _C built with the CUDA kernels, whose machine code is to be checked",
    )
    parser.addoption(
        "--site", metavar="FOLDER", help="the pages as a site, which are to be checked"
    )
    parser.addoption(
        "--every-case",
        action="store_true",
        help=(
            "compile Triton's kernels for a GPU of each generation and all calls of the methods, not"
            " only for sm_90 and gfx942 and a usual call"
        ),
    )
    parser.addoption(
        "--without-poison",
        action="store_true",
        help="leave memory for results as it is, for tools that find reads of what nothing wrote",
    )
    parser.addoption(
        "--simulator-seeds",
        default=1,
        type=int,
        help="orders of threads under which cuda_sim has to give the same bits",
    )


def pytest_configure(config: pytest.Config) -> None:
    unknown = required_backends(config) - set(BACKENDS)
    if unknown:
        raise pytest.UsageError(
            f"--require-backend: expected some of {', '.join(BACKENDS)}, got {', '.join(unknown)}"
        )
    parity.REQUIRED |= required_backends(config)
    config.addinivalue_line("markers", "quick: the short list of parity, for sanitizers")
    config.addinivalue_line("markers", "backend(name): there only where this backend can run")
    config.addinivalue_line("markers", "checkout: reads what git or only the repository holds")
    # Workers of pytest-xdist share the processor; results do not depend on the number of threads.
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``isa``: each instruction set that the processor runs, of those for which the module's OPERATOR
    has kernels, or where it names none, for which all have; and cpu_sim, where the module says with
    ON_SIMULATED_TILES that its tests take it for one.
    """
    if "isa" in metafunc.fixturenames:
        operator = getattr(metafunc.module, "OPERATOR", None)
        forms = dispatch.forms_of(operator, "cpu") if operator else native.cpu_forms()
        if getattr(metafunc.module, "ON_SIMULATED_TILES", False):
            forms = (*forms, "cpu_sim")
        metafunc.parametrize("isa", forms, ids=_request)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out tests marked with a backend that cannot run here and does not have to, those of
    float32 on tiles, which multiply bfloat16, and in an unpacked sdist those of a checkout.
    """
    out = [item for item in items if not _is_true_here(item)]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in set(out)]


def _is_true_here(item: pytest.Item) -> bool:
    marks = item.iter_markers("backend")
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    on_tiles = parameters.get("isa") == native.TILES and parameters.get("precision") == "float32"
    if item.get_closest_marker("checkout") and IS_SDIST:
        return False
    return not on_tiles and all(parity.can_run(OPERATORS[0], mark.args[0]) for mark in marks)


@pytest.fixture(autouse=True)
def _marked_backend(request: pytest.FixtureRequest) -> None:
    """Fails where a marked backend has to run and cannot."""
    for mark in request.node.iter_markers("backend"):
        reason = parity.why_unavailable(OPERATORS[0], mark.args[0])
        if reason:
            pytest.fail(f"backend {mark.args[0]} is required: {reason}")


def _request(isa: str) -> str:
    """What asks for the CPU kernels of an instruction set."""
    return isa if isa in BACKENDS else f"cpu:{isa}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many parity tests ran on each backend, and under which instruction sets the CPU kernels
    were asked for, from the names of the tests.
    """
    names = [
        report.nodeid
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, ())
    ]
    found = (re.search(r"::test_parity\[.*-([\w:]+)\]$", name) for name in names)
    cells = Counter(match[1] for match in found if match)
    if cells:
        counts = ", ".join(f"{request} {cells[request]}" for request in sorted(cells))
        terminalreporter.write_line(f"{cells.total()} parity tests: {counts}")
    found = (re.search(r"\bcpu:(\w+)", name) for name in names)
    ran = Counter(match[1] for match in found if match)
    sets = [f"{isa} ({ran[isa]} tests)" for isa in native.instruction_sets()]
    if any(ran[isa] for isa in native.instruction_sets()):
        processor = native.cpu_info("model name") or native.processor()
        terminalreporter.write_line(f"CPU kernels on {processor}: {', '.join(sets)}")


def required_backends(config: pytest.Config) -> set[str]:
    return {name for name in config.getoption("--require-backend").split(",") if name}


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory(request: pytest.FixtureRequest):
    """Kernels get NaN where they have to write, so that an element left out shows."""
    native.set_poison(not request.config.getoption("--without-poison"))
    yield
    native.set_poison(False)


@pytest.fixture
def need(request: pytest.FixtureRequest):
    """need(backend, reason): without a reason goes on; skips, or fails if required."""

    def need(backend: str, reason: str) -> None:
        if reason and backend in required_backends(request.config):
            pytest.fail(f"backend {backend} is required: {reason}")
        if reason:
            pytest.skip(reason)

    return need


@pytest.fixture
def served(need):
    """served(operator, isa, case, precision): what asks for the CPU kernels of an ``isa``, which must
    not refuse the case.
    """

    def served(operator: str, isa: str, case: Case, precision: str) -> str:
        request = _request(isa)
        need(dispatch.backend_of(request), parity.why_unavailable(operator, request))
        assert not parity.why_refused(operator, request, case, precision)
        return request

    return served


@pytest.fixture
def threads():
    """threads(n): torch, and the kernels with it, run on n threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def between_guards(monkeypatch):
    """``with between_guards(at_least=n)``: each piece of memory that kernels get, n or more, lies between
    two stretches of a known value, which have to be there afterwards.
    """

    @contextmanager
    def between_guards(at_least: int):
        guard, pieces = -77, []

        def empty(shape, dtype, device):
            count = torch.Size(shape).numel()
            memory = torch.full((count + 128,), guard, dtype=dtype)
            pieces.append((memory, count))
            return memory[64 : 64 + count].view(shape)

        monkeypatch.setattr(native, "empty", empty)
        monkeypatch.setattr(native, "fresh", lambda t: empty(t.shape, t.dtype, t.device))
        yield
        monkeypatch.undo()
        assert len(pieces) >= at_least
        for memory, count in pieces:
            beside = torch.cat([memory[:64], memory[64 + count :]])
            assert torch.equal(beside, torch.full((128,), guard, dtype=memory.dtype))

    return between_guards
