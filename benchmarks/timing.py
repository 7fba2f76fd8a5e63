"""How things are timed: contenders take turns, so that drift hits all of them; medians count."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

ROUNDS = (5, 400)  # at least and at most
SAMPLE = 2e-4  # seconds; shorter calls are timed several at once, on a CPU
Function = Callable[[], Any]


def interleaved(
    contenders: dict[str, Function], device: str, seconds: float
) -> dict[str, list[float]]:
    """Seconds of one call, for each contender one sample per round.

    It goes round until the contenders have used ``seconds`` each, on average. On a GPU a call is
    timed by events, after a write that empties the cache and gives the host time to run ahead: what
    counts is the device's time, and `benchmarks.host_overhead` measures the host's.
    """
    sample = _on_gpu() if device == "cuda" else _on_cpu
    estimates = {}
    for name, function in contenders.items():
        function()
        estimates[name] = min(sample(function, 1) for _ in range(3))
    round_seconds = sum(max(SAMPLE, estimate) for estimate in estimates.values())
    rounds = round(seconds * len(contenders) / round_seconds)
    rounds = min(max(rounds, ROUNDS[0]), ROUNDS[1])
    calls = {name: max(1, round(SAMPLE / estimate)) for name, estimate in estimates.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, function in contenders.items():
            samples[name].append(sample(function, calls[name]))
    return samples


def _on_cpu(function: Function, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def _on_gpu() -> Callable[[Function, int], float]:
    cache = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def sample(function: Function, calls: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return sample


def median(samples: list[float]) -> float:
    """The middle sample."""
    return statistics.median(samples)


def spread(samples: list[float]) -> float:
    """From the 20th to the 80th of a hundred samples, as a share of the median."""
    low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
    return (high - low) / statistics.median(samples)


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
