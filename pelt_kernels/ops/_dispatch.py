"""Which backend serves a call: the table of backends, the choice, and the means to ask why.

A backend is one file in an operator's folder with three functions, `supports(signature, backend,
form, needs_grad)`, `forward(chosen, ...)` and `backward(chosen, ...)`; what is the same for equal
calls it may make once in a fourth, `plan(chosen)`, and finds it as `chosen.plan`. A file that is
not there is a cell that does not exist. A backend with several ways to serve a call names them in
`FORMS` and finds the chosen one in `chosen.form`; a request for one is written ``backend:form``. On
a CPU the forms are instruction sets.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType

import torch

from . import _forms, _native, _request
from ._contract import Chosen, Signature

logger = logging.getLogger("pelt_kernels")


@dataclass(frozen=True)
class Backend:
    """A column of the support table."""

    file: str  # the module in each operator's folder
    devices: tuple[str, ...]  # device types it may serve; empty: any
    is_automatic: bool  # False: only on request
    library: str = ""  # the compiled module it needs
    forms: str = "its forms of this operator"  # what FORMS are, for a sentence; empty: it has none


# In the order in which they are tried.
BACKENDS: dict[str, Backend] = {
    "cuda": Backend("native", ("cuda",), True, library="_C"),
    "triton": Backend("triton", ("cuda", "cpu"), True),
    "cpu": Backend(
        "native",
        ("cpu",),
        True,
        library="_C",
        forms="the instruction sets that it has kernels for and this processor runs",
    ),
    "cuda_sim": Backend("native", ("cpu",), False, library="_C_sim"),
    "cpu_sim": Backend("native", ("cpu",), False, library="_C_sim", forms=""),
    "eager": Backend("eager", (), True),
}

# The decisions of all threads.
_choices: dict[str, dict[str, Choice]] = {}
_choices_lock = threading.Lock()
_era = 0  # grows when choices are forgotten


@dataclass(frozen=True)
class Choice:
    """One decision: which backend serves these sizes, and why each backend before it does not."""

    operator: str
    call: str
    backend: str
    requested: str
    refusals: dict[str, str]  # of backends, and of forms as backend:form
    form: str = ""  # where the backend has several
    form_reason: str = ""

    @property
    def served(self) -> str:
        """The backend, with its form where it has several: the request for the same."""
        return f"{self.backend}:{self.form}" if self.form else self.backend

    def __str__(self) -> str:
        why = "as asked" if self.requested else "automatic"
        reason = f"; {self.form} {self.form_reason}" if self.form_reason else ""
        refused = "".join(f"; {name}: {reason}" for name, reason in self.refusals.items())
        return f"{self.call} -> {self.served} ({why}{reason}{refused})"


class BackendError(ValueError):
    """A backend was asked for by name and cannot serve the call."""


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Asks for one backend by name for every operator inside the block (``None``: automatic again).
    ``"cuda:single"`` or ``"cpu:avx2"`` asks for a form of its kernels too, of those operators that
    have several.

    The request holds in this thread, and in this task of asyncio, until the block is left: other
    threads, and those started inside it, have their own. Backward runs on the backend that ran
    forward, wherever it is called; with ``create_graph=True`` by the operator's formula. What
    activation checkpointing computes again in backward follows the request where backward was
    called. A call's own ``backend=`` goes first; outside of any block the environment variable
    PELT_KERNELS_BACKEND holds. Raises ValueError for an unknown name, and later, at the call,
    BackendError if that backend cannot serve it.
    """
    name = "" if name is None else name
    check_name(name)
    with _request.block(name):
        yield


def check_name(name: str, who: str = "backend: expected") -> None:
    """Raises ValueError for a name that is none, with the names that are, and TypeError for what is
    no name at all; ``who`` begins the sentence.
    """
    if not isinstance(name, str):
        raise TypeError(f"{who} a name or None, got {type(name).__name__}")
    if name and backend_of(name) not in BACKENDS:
        raise ValueError(f"{who} one of {', '.join(BACKENDS)}, got {name!r}")


def request_of(operator: str, backend: str | None, is_compiling: bool) -> str:
    """A call's own request, or the current one."""
    if backend is None:
        return _request.compiled() if is_compiling else _request.current()
    if not isinstance(backend, str):
        check_name(backend, f"{operator}: expected backend as")
    return backend


def current_request() -> str:
    """The backend asked for by `use_backend` or PELT_KERNELS_BACKEND; empty for the automatic
    choice.
    """
    return _request.compiled() if torch.compiler.is_compiling() else _request.current()


def explain(operator: str | None = None) -> list[Choice]:
    """The decisions made in this process, by all its threads, per operator and combination of
    sizes, newest last.

    Each `Choice` tells the backend that serves the call, whether it was asked for, and why each
    backend tried before it was refused: because it cannot serve the call, or because eager was
    measured to be faster; ``print(*explain(), sep="\\n")`` reads well.
    """
    with _choices_lock:
        if operator is not None:
            return list(_choices.get(operator, {}).values())
        return [choice for choices in _choices.values() for choice in choices.values()]


def forget_choices() -> None:
    """Empties the list of `explain`, so that a run reports only its own calls."""
    global _era
    with _choices_lock:
        _choices.clear()
        _era += 1


def select(signature: Signature, request: str, needs_grad: bool = True) -> Chosen:
    """What serves a call: the backend asked for, or the first able one that was not measured slower
    than eager. Raises BackendError.

    ``needs_grad`` False: no backward will follow, so forward alone has to be able, and forward's
    measurements decide. Beside that it reads the signature only, so forward and backward of one
    call always agree.
    """
    chosen = signature.chosen[needs_grad].get(request)
    if chosen is None:
        choice = _select(signature, request, needs_grad)
        module = implementation(signature.contract.name, choice.backend)
        chosen = Chosen(signature, choice.backend, choice.form)
        chosen.forward, chosen.backward, chosen.choice = module.forward, module.backward, choice
        if hasattr(module, "plan"):
            chosen.plan = module.plan(chosen)
        signature.chosen[needs_grad][request] = chosen
        _remember(chosen)
    elif chosen.era != _era:  # chosen before `forget_choices`
        _remember(chosen)
    return chosen


def _select(signature: Signature, request: str, needs_grad: bool) -> Choice:
    check_name(request, f"{signature.contract.name}: expected backend as")
    if request:
        reason = why_not(request, signature, needs_grad)
        if reason:
            able = [
                name
                for name in BACKENDS
                if name != request and not why_not(name, signature, needs_grad)
            ]
            raise BackendError(
                f"{signature.contract.name}: backend '{request}' was asked for but {reason}.  "
                f"Able: {', '.join(able)}."
            )
        return _choose_form(signature, request, request, {}, needs_grad)[0]
    refusals: dict[str, str] = {}
    for name, backend in BACKENDS.items():
        if not backend.is_automatic:
            continue
        if name == "triton" and signature.device.type == "cpu":
            continue  # its interpreter is for tests, on request
        if not _serves_device(backend, signature):
            if name == "cuda":  # which is what somebody would look for
                refusals[name] = why_not(name, signature)
            continue
        reason = why_not(name, signature, needs_grad)
        if not reason:
            choice, reason = _choose_form(signature, name, "", refusals, needs_grad)
            if not reason:
                return choice
        refusals[name] = reason
        logger.info("%s: not on %s: %s", signature, name, reason)
    raise BackendError(f"{signature.contract.name}: no backend serves {signature}: {refusals}")


def _choose_form(
    signature: Signature, name: str, request: str, refusals: dict[str, str], needs_grad: bool
) -> tuple[Choice, str]:
    """The choice of a backend that serves the call, with the first able one of its forms; and why
    an automatic choice passes it by: eager was measured faster, or nobody has measured.
    """
    backend, _, asked = name.partition(":")
    forms = forms_of(signature.contract.name, backend)
    choice = Choice(signature.contract.name, str(signature), backend, request, refusals)
    if asked:
        return replace(choice, form=asked if forms else ""), ""
    requests = _requests(backend, forms)
    row = _forms.nearest(signature, requests, needs_grad)
    for found, reason in _forms.ranked(signature, requests, row):
        form = found.partition(":")[2]
        refusal = _supports(backend, signature, form, needs_grad)
        if not refusal:
            choice = replace(choice, form=form, form_reason=reason)
            return choice, _forms.why_slower(found, row) or _forms.why_unproven(backend, signature)
        refusals[found] = refusal
    raise AssertionError(f"{signature}: {backend} serves it in one of {forms}, and in none of them")


def check_formula(operator: str, request: str, why: str) -> None:
    """Raises BackendError where a backend was asked for by name and a call has to be made of
    PyTorch's own operations, which is eager's way.
    """
    check_name(request, f"{operator}: expected backend as")
    if backend_of(request) not in ("", "eager"):
        raise BackendError(
            f"{operator}: backend '{request}' was asked for but {why}.  Able: eager; without a "
            "request it is chosen here."
        )


def remember_formula(signature: Signature, request: str, why: str) -> None:
    """Records for `explain` that a call was served by the operator's formula."""
    _record(
        Choice(
            signature.contract.name, str(signature), "eager", request, {}, "formula", f"since {why}"
        )
    )


def _remember(chosen: Chosen) -> None:
    chosen.era = _era
    _record(chosen.choice)


def _record(choice: Choice) -> None:
    with _choices_lock:
        choices = _choices.setdefault(choice.operator, {})
        if len(choices) < 1024:  # enough to read; more would only be a leak
            # A choice that is the same with and without gradients is listed once.
            choices[f"{choice} {choice.requested}"] = choice


def why_not(name: str, signature: Signature, needs_grad: bool = True) -> str:
    """Why a backend, or one form of it, cannot serve a call, in one sentence; empty if it can. With
    ``needs_grad`` backward is a part of the call.
    """
    name, _, form = name.partition(":")
    backend = BACKENDS[name]
    if not _serves_device(backend, signature):
        reason = f"it serves {' and '.join(backend.devices)} tensors, not {signature.device.type}"
        no_gpu = _native.why_no_gpu() if backend.devices == ("cuda",) else ""
        return f"{reason} ({no_gpu})" if no_gpu else reason
    if not has_file(signature.contract.name, name):
        return "it has no such operator yet"
    if backend.library:
        reason = _native.why_not(backend.library)
        if reason:
            return reason
    forms = forms_of(signature.contract.name, name) or ("",)
    if form and forms != ("",):
        if form not in forms:
            return f"it expects one of {backend.forms} ({', '.join(forms)}), not '{form}'"
        forms = (form,)
    refusals: dict[str, None] = {}
    for form in forms:
        refusal = _supports(name, signature, form, needs_grad)
        if not refusal:
            return ""
        refusals[refusal] = None
    return "; ".join(refusals)


def _supports(name: str, signature: Signature, form: str, needs_grad: bool) -> str:
    module = implementation(signature.contract.name, name)
    reason: str = module.supports(signature, name, form, needs_grad)
    return reason


def forms_of(operator: str, backend: str) -> tuple[str, ...]:
    """The ways in which a backend can serve an operator, the usual one first; empty for one way."""
    if not BACKENDS[backend].forms:
        return ()
    forms: dict[str, tuple[str, ...]] = getattr(implementation(operator, backend), "FORMS", {})
    return forms.get(backend.removesuffix("_sim"), ())


def every_request(operator: str, backend: str) -> list[str]:
    """The requests for a backend, or for each of its forms, to serve an operator."""
    return _requests(backend, forms_of(operator, backend) if BACKENDS[backend].library else ())


def requests_of(operator: str, backend: str) -> list[str]:
    """`every_request` between which speed has to decide: of instruction sets the best and the
    tiles, because the others are for older processors.
    """
    requests = every_request(operator, backend)
    if backend != "cpu":
        return requests
    return [r for r in requests if r == requests[0] or r == f"{backend}:{_native.TILES}"]


def _requests(backend: str, forms: Sequence[str]) -> list[str]:
    return [f"{backend}:{form}" for form in forms] or [backend]


def backend_of(request: str) -> str:
    """The backend's name in a request, which may name a form too."""
    return request.partition(":")[0]


def _serves_device(backend: Backend, signature: Signature) -> bool:
    return not backend.devices or signature.device.type in backend.devices


@cache
def has_file(operator: str, backend: str) -> bool:
    """Is there an implementation of an operator on a backend?"""
    file = BACKENDS[backend].file
    return importlib.util.find_spec(f"pelt_kernels.ops.{operator}.{file}") is not None


def contract_of(operator: str) -> ModuleType:
    """The module with an operator's CONTRACT and reference."""
    return importlib.import_module(f"pelt_kernels.ops.{operator}.contract")


@cache
def implementation(operator: str, backend: str) -> ModuleType:
    """The module that implements an operator on a backend."""
    return importlib.import_module(f"pelt_kernels.ops.{operator}.{BACKENDS[backend].file}")


def support_table(operators: list[str]) -> str:
    """The table of operators and backends, in Markdown, from the files that exist."""
    columns = list(BACKENDS)
    head = f"| operator | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}\n"
    rows = (
        f"| `{operator}` | "
        + " | ".join("yes" if has_file(operator, name) else "–" for name in columns)
        + " |\n"
        for operator in operators
    )
    return head + "".join(rows)
