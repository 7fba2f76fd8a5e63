"""How things are timed: contenders take turns, so that drift hits all of them; medians count."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from math import ceil
from typing import Any, NamedTuple

import torch

ROUNDS = (5, 400)  # at least and at most
SAMPLE = 2e-4  # seconds; shorter calls are timed several at once
FLUSHED = 256 << 20  # bytes read before each sample: several times a GPU's second-level cache
SLEEP = 4_000_000  # cycles, two milliseconds: what a host needs to enqueue a training step's layer
Function = Callable[..., Any]


class OnSets:
    """A function of a set of inputs, as a call without arguments; there are several such sets, with
    the same values at other addresses, and the call on the n-th is ``self(n)``.
    """

    def __init__(self, function: Function, sets: Sequence[Any]) -> None:
        self.function, self.sets = function, sets

    def __call__(self, n: int = 0) -> None:
        self.function(self.sets[n])


class Sampler(NamedTuple):
    """Measures one call's seconds; ``way`` says how."""

    seconds: Callable[[], float]
    way: str


def interleaved(
    contenders: dict[str, Function],
    device: str,
    seconds: float,
    ways: dict[str, str] | None = None,
) -> dict[str, list[float]]:
    """Seconds of one call, for each contender one sample per round.

    It goes round until the contenders have used ``seconds`` each, on average. On a GPU the device's
    time counts, see `_on_gpu`; `host_seconds` measures the host's. ``ways`` is told how each
    contender was timed.
    """
    prepare = _on_gpu() if device == "cuda" else _on_cpu
    samplers = {name: prepare(function) for name, function in contenders.items()}
    if ways is not None:
        ways.update((name, sampler.way) for name, sampler in samplers.items())
    round_seconds = sum(
        max(SAMPLE, min(sampler.seconds() for _ in range(3))) for sampler in samplers.values()
    )
    rounds = round(seconds * len(contenders) / round_seconds)
    rounds = min(max(rounds, ROUNDS[0]), ROUNDS[1])
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, sampler in samplers.items():
            samples[name].append(sampler.seconds())
    return samples


def _on_cpu(function: Function) -> Sampler:
    def seconds(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls

    function()
    calls = max(1, round(SAMPLE / min(seconds(1) for _ in range(3))))
    return Sampler(lambda: seconds(calls), "clock")


def _on_gpu() -> Callable[[Function], Sampler]:
    """A sample is the replay of a CUDA graph of the call, so that the time between launches is the
    device's and not the host's; of a short call the graph holds several, each on inputs of its own.
    A call that cannot be captured is timed behind a kernel that sleeps until the host has enqueued
    all of it. Before each sample memory is read that fills the cache, so that no input lies there,
    and nothing that would still have to be written back.
    """
    filler = torch.ones(FLUSHED // 4, device="cuda")
    total = torch.empty((), device="cuda")

    def timed(enqueue: Callable[[], Any], sleeps: bool) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.sum(filler, dim=0, out=total)
        if sleeps:
            torch.cuda._sleep(SLEEP)
        start.record()
        enqueue()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def prepare(function: Function) -> Sampler:
        function()
        alone = Sampler(lambda: timed(function, sleeps=True), "stream")
        estimate = min(alone.seconds() for _ in range(3))
        several = isinstance(function, OnSets)
        calls = min(len(function.sets), ceil(SAMPLE / estimate)) if several else 1
        graph = _captured([partial(function, n) for n in range(calls)] if several else [function])
        if graph is None:
            return alone
        return Sampler(lambda: timed(graph.replay, sleeps=False) / calls, "graph")

    return prepare


def _captured(calls: Sequence[Function]) -> torch.cuda.CUDAGraph | None:
    """A graph of the calls; None where one waits for the device or its memory is not to be had."""
    before, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(before)
    graph = torch.cuda.CUDAGraph()
    mode = torch.cuda.get_sync_debug_mode()
    gc.collect()
    gc.disable()  # what it frees during the capture may be an event or memory of the device
    try:
        torch.cuda.set_stream(side)
        # A wait found here is an exception; found during the capture it would break the generators.
        torch.cuda.set_sync_debug_mode("error")
        for call in calls:
            call()
        torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.synchronize()
        graph.capture_begin()
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    except RuntimeError:
        return None
    finally:
        torch.cuda.set_sync_debug_mode(mode)
        gc.enable()
        torch.cuda.synchronize()
        torch.cuda.set_stream(before)
    graph.replay()
    return graph


def host_seconds(function: Function, repeats: int = 5) -> float:
    """What a call takes the host on a GPU: until it returns, while the device sleeps."""
    laps = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        torch.cuda._sleep(SLEEP)
        start = time.perf_counter()
        function()
        laps.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return min(laps)


def lap(call: Callable[[], Any], device: str) -> tuple[float, float]:
    """Seconds on the clock and of the processor, until the device has done the call."""
    begun = time.perf_counter(), time.process_time()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun[0], time.process_time() - begun[1]


def median(samples: list[float]) -> float:
    """The middle sample."""
    return statistics.median(samples)


def spread(samples: list[float]) -> float:
    """From the 20th to the 80th of a hundred samples, as a share of the median."""
    low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
    return (high - low) / statistics.median(samples)


def paired(ratios: Sequence[float]) -> dict[str, float]:
    """The median of the ratios of pairs, and the 20th and the 80th of a hundred."""
    several = ratios if len(ratios) > 1 else [*ratios, *ratios]
    low, *_, high = statistics.quantiles(several, n=5, method="inclusive")
    return {"median": statistics.median(ratios), "low": low, "high": high}


def peak_bytes(function: Function, device: str) -> int:
    """The most that one call has allocated at a time, beyond what was there before it.

    On a CPU torch's profiler counts what goes through torch's allocator; the few kilobytes that a
    kernel keeps for each thread do not.
    """
    function()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    live = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        live += change
        peak = max(peak, live)
    return peak
