"""Which backend serves a call, and what is said about it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pelt_kernels.ops import (
    BACKENDS,
    BackendError,
    _dispatch,
    _native,
    explain,
    forget_choices,
    gated_adapter,
    use_backend,
)


@pytest.fixture(autouse=True)
def _no_choices():
    forget_choices()
    yield
    forget_choices()


def call(rows=3, dtype=torch.float32, **more):
    return gated_adapter(
        torch.ones(rows, 16, dtype=dtype),
        torch.ones(4, 16, dtype=dtype),
        torch.ones(16, 4, dtype=dtype),
        **more,
    )


def only_choice():
    (choice,) = explain("gated_adapter")
    return choice


def test_a_request_is_served_as_asked():
    with use_backend("eager"):
        call()
    assert only_choice().backend == "eager" and only_choice().requested == "eager"
    assert "-> eager (as asked" in str(only_choice())


def test_the_call_goes_before_the_context_and_the_context_ends():
    with use_backend("cuda"):
        call(backend="eager")
        with use_backend(None):
            assert _dispatch.current_request() == ""
        assert _dispatch.current_request() == "cuda"
        with pytest.raises(BackendError):
            call()
    assert _dispatch.current_request() == ""


def test_an_automatic_choice_tells_why_others_were_refused(monkeypatch, caplog):
    monkeypatch.setattr(_native, "why_not", lambda name: f"no {name} today")
    caplog.set_level("INFO", "pelt_kernels")
    for _ in range(3):
        call(rows=1009)
    choice = only_choice()
    assert choice.backend == "eager"
    if _dispatch.has_file("gated_adapter", "cpu"):
        assert choice.refusals["cpu"] == "no _C today"
        assert sum("no _C today" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("name", ["cuda", "cuda_sim", "triton", "cpu"])
def test_a_backend_that_cannot_serve_says_why_and_who_can(name, monkeypatch):
    monkeypatch.setattr(_native, "why_not", lambda library: f"no {library} today")
    monkeypatch.setattr(_dispatch, "has_file", lambda operator, file: file != "triton")
    with pytest.raises(
        BackendError,
        match=rf"^gated_adapter: backend '{name}' was asked for but .*\.  Able: .*eager",
    ) as caught:
        call(rows=1013, backend=name)
    assert "\n" not in str(caught.value)


def test_an_unknown_backend_is_named_with_the_known_ones():
    sentence = f"backend: expected one of {', '.join(BACKENDS)}, got 'tpu'"
    with pytest.raises(ValueError, match=sentence), use_backend("tpu"):
        pass
    with pytest.raises(ValueError, match=sentence):
        call(backend="tpu")
    code = (
        "import pelt_kernels.ops as o, torch; o.gated_adapter(torch.ones(1, 8), torch.ones(2, 8),"
        " torch.ones(8, 2))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PELT_KERNELS_BACKEND": "tpu", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and sentence in done.stderr


def test_forgetting_lets_a_run_report_only_its_own_calls():
    call()
    forget_choices()
    assert explain() == []
    call()
    assert len(explain()) == 1


def test_forward_and_backward_run_on_the_same_backend(monkeypatch):
    x = torch.ones(3, 16, requires_grad=True)
    eager, seen = _dispatch.implementation("gated_adapter", "eager"), []

    def spy(call, needs, **values):
        seen.append(call.backend)
        return original(call, needs, **values)

    original = eager.backward
    monkeypatch.setattr(eager, "backward", spy)
    with use_backend("eager"):
        y = gated_adapter(x, torch.ones(4, 16), torch.ones(16, 4), scale=0.123)
    y.sum().backward()
    assert seen == ["eager"]


def test_the_support_table_lists_files():
    table = _dispatch.support_table(["gated_adapter"])
    head, _, row = table.strip().splitlines()
    cells = dict(
        zip(
            (c.strip() for c in head.split("|")[1:-1]),
            (c.strip() for c in row.split("|")[1:-1]),
            strict=True,
        )
    )
    assert cells.pop("operator") == "`gated_adapter`" and cells["eager"] == "yes"
    assert cells == {
        name: "yes" if _dispatch.has_file("gated_adapter", BACKENDS[name].file) else "–"
        for name in BACKENDS
    }
