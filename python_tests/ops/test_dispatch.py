"""Which backend serves a call, and what is said about it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

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


def call_with(x):
    return gated_adapter(x, torch.ones(4, 16), torch.ones(16, 4))


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


def in_thread(function, *args):
    """What it returns, called in a thread of its own."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function(*args)))
    thread.start()
    thread.join()
    return found[0]


def test_overlapping_blocks_of_threads_do_not_meet():
    first_open, second_open, first_left = (threading.Event() for _ in range(3))
    seen = {}

    def first():
        with use_backend("eager"):
            first_open.set()
            second_open.wait(10)
            seen["first"] = _dispatch.current_request()
        first_left.set()

    def second():
        first_open.wait(10)
        seen["second, before"] = _dispatch.current_request()
        with use_backend("cpu"):
            second_open.set()
            first_left.wait(10)
            seen["second"] = _dispatch.current_request()

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {"first": "eager", "second, before": "", "second": "cpu"}
    assert _dispatch.current_request() == ""
    with use_backend("eager"):
        assert in_thread(_dispatch.current_request) == ""


def test_tasks_have_their_own_request():
    async def task(name):
        with use_backend(name):
            await asyncio.sleep(0)
            return _dispatch.current_request()

    async def both():
        return await asyncio.gather(task("eager"), task("cpu"))

    assert asyncio.run(both()) == ["eager", "cpu"]


def test_blocks_may_be_left_in_any_order_and_by_an_exception():
    def holder(name):
        with use_backend(name):
            yield

    first, second = holder("eager"), holder("cpu")
    next(first), next(second)
    first.close()
    assert _dispatch.current_request() == "cpu"
    second.close()
    assert _dispatch.current_request() == ""
    third = holder("eager")
    next(third)
    in_thread(third.close)
    assert _dispatch.current_request() == ""
    with pytest.raises(KeyError), use_backend("cpu"):
        raise KeyError
    assert _dispatch.current_request() == ""


def test_what_checkpointing_computes_again_follows_the_request():
    """In a thread of autograd's too: backward inside of backward, more than 60 deep, goes there."""
    x = torch.ones(3, 16, requires_grad=True)
    here, others = threading.get_ident(), set()

    class Deeper(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dx):
            y = x.detach().requires_grad_()
            with torch.enable_grad():
                if threading.get_ident() == here:
                    Deeper.apply(y).sum().backward()
                else:
                    others.add(threading.get_ident())
                    call_with(y)  # as a checkpoint does
            return dx

    with use_backend("eager"):
        Deeper.apply(x).sum().backward()
    assert others
    assert {choice.requested for choice in explain()} == {"eager"}


def test_a_compiled_function_follows_the_request():
    x = torch.ones(3, 16)

    def inside(x):
        with use_backend("eager"):
            return call_with(x)

    def requests(function):
        forget_choices()
        function(x)
        return [choice.requested for choice in explain()]

    torch._dynamo.reset()
    compiled = torch.compile(call_with, fullgraph=True, backend="aot_eager")
    assert requests(compiled) == [""]
    with use_backend("eager"):
        assert requests(compiled) == ["eager"]
        assert in_thread(requests, compiled) == [""]
    assert requests(compiled) == [""]
    assert requests(torch.compile(inside, fullgraph=True, backend="aot_eager")) == ["eager"]
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
    names = f"one of {', '.join(BACKENDS)}, got 'tpu'"
    with pytest.raises(ValueError, match=f"^backend: expected {names}"), use_backend("tpu"):
        pass
    with pytest.raises(TypeError, match="^backend: expected a name or None"), use_backend(3):
        pass
    sentence = f"gated_adapter: expected backend as {names}"
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
        name: "yes" if _dispatch.has_file("gated_adapter", name) else "–" for name in BACKENDS
    }


def test_a_choice_for_the_cpu_tells_why_no_gpu_was_taken(monkeypatch):
    call(rows=1019)
    assert only_choice().refusals["cuda"].startswith("it serves cuda tensors, not cpu")
    _native.why_no_gpu.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _native.why_no_gpu() == f"torch {torch.__version__} is built without CUDA"
    _native.why_no_gpu.cache_clear()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("os.path.exists", lambda path: False)
    assert _native.why_no_gpu().endswith("neither /dev/nvidiactl nor /dev/dxg")
    _native.why_no_gpu.cache_clear()
