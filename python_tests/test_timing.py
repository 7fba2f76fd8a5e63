"""`benchmarks.timing` on a GPU that is made up: what is captured, what is timed behind a sleep, and
that a call which cannot be captured leaves everything as it was.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks import timing


class Gpu:
    """Stands in for `torch` in the module under test; a call takes it a tenth of a millisecond."""

    def __init__(self) -> None:
        self.stream, self.mode, self.is_capturing, self.calls = "own", "default", False, []
        self.slept, self.captured, self.milliseconds = 0, [], 0.1
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None: ...
            def synchronize(self) -> None: ...
            def elapsed_time(self, end: Event) -> float:
                return gpu.milliseconds

        class CUDAGraph:  # the library's name
            def capture_begin(self) -> None:
                gpu.is_capturing = True

            def capture_end(self) -> None:
                gpu.is_capturing = False

            def replay(self) -> None:
                gpu.calls.append("replay")

        self.cuda = SimpleNamespace(
            Event=Event,
            CUDAGraph=CUDAGraph,
            Stream=lambda: SimpleNamespace(wait_stream=lambda other: None),
            current_stream=lambda: self.stream,
            set_stream=lambda stream: setattr(self, "stream", stream),
            synchronize=self._synchronize,
            get_sync_debug_mode=lambda: "default",
            set_sync_debug_mode=lambda mode: setattr(self, "mode", mode),
            _sleep=self._sleep,
        )

    def _synchronize(self) -> None:
        assert not self.is_capturing, "a wait breaks a capture"

    def _sleep(self, cycles: int) -> None:
        self.slept += 1

    def ones(self, *shape: int, device: str) -> str:
        return "memory"

    empty = ones

    def sum(self, filler: str, dim: int, out: str) -> None: ...


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr(timing, "torch", gpu)
    return gpu


def assert_restored(gpu):
    assert (gpu.stream, gpu.mode, gpu.is_capturing) == ("own", "default", False)


def test_a_short_call_is_captured_on_several_sets_of_inputs(gpu):
    seen = []

    def function(values):
        if gpu.is_capturing:
            seen.append(values)

    ways = {}
    samples = timing.interleaved({"a": timing.OnSets(function, "abcde")}, "cuda", 1e-3, ways)
    # Two calls of 0.1 ms make a sample of 0.2 ms.
    assert seen == ["a", "b"] and ways == {"a": "graph"}
    assert samples["a"] == pytest.approx([0.05e-3] * len(samples["a"]))
    assert len(samples["a"]) >= timing.ROUNDS[0]
    assert_restored(gpu)


def test_a_long_call_is_captured_once(gpu):
    gpu.milliseconds, seen = 5.0, []
    call = timing.OnSets(lambda values: gpu.is_capturing and seen.append(values), "abc")
    timing.interleaved({"a": call}, "cuda", 1e-3)
    assert seen == ["a"]


def test_a_call_that_waits_for_the_device_is_timed_behind_a_sleep(gpu):
    def waits():
        assert not gpu.is_capturing
        if gpu.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    ways = {}
    before = gpu.slept
    samples = timing.interleaved({"a": waits}, "cuda", 1e-3, ways)
    assert ways == {"a": "stream"} and gpu.slept - before >= len(samples["a"])
    assert "replay" not in gpu.calls
    assert_restored(gpu)


def test_a_capture_that_fails_is_ended(gpu):
    def refuses():
        if gpu.is_capturing:
            raise RuntimeError("out of memory")

    ways = {}
    timing.interleaved({"a": refuses}, "cuda", 1e-3, ways)
    assert ways == {"a": "stream"}
    assert_restored(gpu)


def test_the_host_is_timed_while_the_device_sleeps(gpu):
    asleep = []
    assert timing.host_seconds(lambda: asleep.append(gpu.slept)) >= 0
    assert asleep == [1, 2, 3, 4, 5]
