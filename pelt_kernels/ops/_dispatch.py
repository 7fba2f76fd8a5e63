"""Which backend serves a call: the table of backends, the choice, and the means to ask why.

A backend is one file in an operator's folder with three functions, `supports(call)`, `forward(call,
...)` and `backward(call, ...)`. A file that is not there is a cell that does not exist.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType

from . import _native
from ._contract import Call

logger = logging.getLogger("pelt_kernels")


@dataclass(frozen=True)
class Backend:
    """A column of the support table."""

    file: str  # the module in each operator's folder
    devices: tuple[str, ...]  # device types it may serve; empty: any
    is_automatic: bool  # False: only on request
    library: str = ""  # the compiled module it needs


# In the order in which they are tried.
BACKENDS: dict[str, Backend] = {
    "cuda": Backend("cuda", ("cuda",), True, library="_C"),
    "triton": Backend("triton", ("cuda", "cpu"), True),
    "cpu": Backend("cpu", ("cpu",), True, library="_C"),
    "cuda_sim": Backend("cuda", ("cpu",), False, library="_C_sim"),
    "eager": Backend("eager", (), True),
}

_requested = os.environ.get("PELT_KERNELS_BACKEND", "")
_choices: dict[str, dict[str, Choice]] = {}


@dataclass(frozen=True)
class Choice:
    """One decision: which backend serves these sizes, and why each backend before it does not."""

    operator: str
    call: str
    backend: str
    requested: str
    refusals: dict[str, str]

    def __str__(self) -> str:
        why = "as asked" if self.requested else "first able"
        refused = "".join(f"; {name}: {reason}" for name, reason in self.refusals.items())
        return f"{self.call} -> {self.backend} ({why}{refused})"


class BackendError(ValueError):
    """A backend was asked for by name and cannot serve the call."""


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Asks for one backend by name for every operator inside the block (``None``: automatic again).

    The request is process-wide, like `torch.set_default_dtype`, so that it also reaches the threads
    in which autograd runs. A call's own ``backend=`` goes first; the environment variable
    PELT_KERNELS_BACKEND is the initial value. Raises ValueError for an unknown name, and later, at
    the call, BackendError if that backend cannot serve it.
    """
    global _requested
    check_name(name or "")
    before, _requested = _requested, name or ""
    try:
        yield
    finally:
        _requested = before


def check_name(name: str) -> None:
    if name and name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")


def current_request() -> str:
    """The backend asked for by `use_backend` or PELT_KERNELS_BACKEND; empty for the automatic
    choice.
    """
    return _requested


def explain(operator: str | None = None) -> list[Choice]:
    """The decisions made in this process, per operator and combination of sizes, newest last.

    Each `Choice` tells the backend that serves the call, whether it was asked for, and why each
    backend tried before it was refused; ``print(*explain(), sep="\\n")`` reads well.
    """
    if operator is not None:
        return list(_choices.get(operator, {}).values())
    return [choice for choices in _choices.values() for choice in choices.values()]


def forget_choices() -> None:
    """Empties what `explain` tells, so that a run reports only its own calls."""
    _choices.clear()


def select(call: Call, request: str) -> Call:
    """The call with its backend: the one asked for, or the first able one. Raises BackendError.

    It reads the call's sizes, dtype and device only, so forward and backward of one call always
    agree.
    """
    chosen = call.selected.get(request)
    if chosen is None:
        backend, refusals = _select(call, request)
        module = implementation(call.contract.name, backend)
        chosen = replace(
            call, backend=backend, forward=module.forward, backward=module.backward, selected={}
        )
        call.selected[request] = chosen
        _remember(chosen, request, refusals)
    elif call.contract.name not in _choices:  # chosen before `forget_choices`
        _remember(chosen, request, {})
    return chosen


def _select(call: Call, request: str) -> tuple[str, dict[str, str]]:
    check_name(request)
    if request:
        reason = why_not(request, call)
        if reason:
            able = [name for name in BACKENDS if name != request and not why_not(name, call)]
            raise BackendError(
                f"{call.contract.name}: backend '{request}' was asked for but {reason}.  Able:"
                f" {', '.join(able)}."
            )
        return request, {}
    refusals: dict[str, str] = {}
    for name, backend in BACKENDS.items():
        if not backend.is_automatic or not _serves_device(backend, call):
            continue
        if name == "triton" and call.device.type == "cpu":
            continue  # its interpreter is for tests, on request
        reason = why_not(name, call)
        if not reason:
            return name, refusals
        refusals[name] = reason
        logger.info("%s: not on %s: %s", call, name, reason)
    raise BackendError(f"{call.contract.name}: no backend serves {call}: {refusals}")


def _remember(call: Call, request: str, refusals: dict[str, str]) -> None:
    choices = _choices.setdefault(call.contract.name, {})
    if len(choices) < 1024:  # enough to read; more would only be a leak
        choices[f"{call} {request}"] = Choice(
            call.contract.name, str(call), call.backend, request, refusals
        )


def why_not(name: str, call: Call) -> str:
    """Why a backend cannot serve a call, in one sentence; empty if it can."""
    backend = BACKENDS[name]
    if not _serves_device(backend, call):
        return f"it serves {' and '.join(backend.devices)} tensors, not {call.device.type}"
    if not has_file(call.contract.name, backend.file):
        return "it has no such operator yet"
    if backend.library:
        reason = _native.why_not(backend.library)
        if reason:
            return reason
    return implementation(call.contract.name, name).supports(
        replace(call, backend=name, selected={})
    )


def _serves_device(backend: Backend, call: Call) -> bool:
    return not backend.devices or call.device.type in backend.devices


@cache
def has_file(operator: str, file: str) -> bool:
    return importlib.util.find_spec(f"pelt_kernels.ops.{operator}.{file}") is not None


@cache
def implementation(operator: str, backend: str) -> ModuleType:
    """The module that implements an operator on a backend."""
    return importlib.import_module(f"pelt_kernels.ops.{operator}.{BACKENDS[backend].file}")


def support_table(operators: list[str]) -> str:
    """The README's table of operators and backends, in Markdown, from the files that exist."""
    columns = list(BACKENDS)
    head = f"| operator | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}\n"
    rows = (
        f"| `{operator}` | "
        + " | ".join("yes" if has_file(operator, BACKENDS[name].file) else "–" for name in columns)
        + " |\n"
        for operator in operators
    )
    return head + "".join(rows)
