"""`benchmarks.run --check`: is each call at least as fast as the module that people write?

Each case is served as the dispatch chooses, or as ``--backend`` asks, and takes turns with the peer
`plain` in one process, forward and forward+backward. A ratio is plain's median time over ours. The
command ends with 1 if one of them is below the bar or a result was not close enough, with 2 if
there was nothing to check. A case below the bar is measured once more for longer, and the second
figure counts, because other work on the machine may have slowed the first.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from pelt_kernels.ops import _dispatch as dispatch

from . import timing
from .contenders import contenders, peers_of
from .from_tests import Case, parity
from .hold import hold

BAR = 0.97
# The fallback's own goal: it is there for what no kernel serves.
BARS = {"eager": 0.95}
MORE = 5  # times as long, where a case is measured again

Times = Callable[[float], Mapping[str, float]]  # for so many seconds: contender -> its median


class Ratio(NamedTuple):
    """How fast a call is beside `plain`; ``first`` is below the bar where it was measured again."""

    value: float
    bar: float
    first: float | None = None

    @property
    def passes(self) -> bool:
        """NaN does not."""
        return self.value >= self.bar

    def __str__(self) -> str:
        shown = f"{self.value:5.2f}x of plain"
        if self.first is not None:
            shown += f" at the second measurement, {MORE} times as long; first {self.first:.3f}x"
        return shown if self.passes else f"{shown}  BELOW {self.bar}x ({self.value:.3f}x)"


def bar_of(request: str) -> float:
    """What a request has to reach; the empty one is the dispatch's own choice."""
    return BARS.get(dispatch.backend_of(request), BAR)


def ratio_of(times: Times, request: str, seconds: float) -> Ratio:
    """The ratio by one measurement, or by a second one if the first is below the bar."""
    bar = bar_of(request)
    first = _speed(times(seconds), request)
    if first >= bar:
        return Ratio(first, bar)
    return Ratio(_speed(times(MORE * seconds), request), bar, first)


def _speed(medians: Mapping[str, float], request: str) -> float:
    return medians["plain"] / medians[request]


def run(cases: Mapping[str, Sequence[Case]], options: argparse.Namespace) -> int:
    """0 if every ratio reaches its bar, 1 if not, 2 if there is none."""
    failures: list[str] = []
    checked = 0
    for operator, chosen in cases.items():
        for dtype in options.dtypes.split(","):
            for case in chosen:
                for request in options.backends or [""]:
                    for line, passes in _checked(operator, case, dtype, request, options):
                        print(line, flush=True)
                        checked += 1
                        failures += [] if passes else [line]
    if not checked:
        print("benchmarks.run: --check: nothing to check, no case was served", file=sys.stderr)
        return 2
    print(f"{checked - len(failures)} of {checked} pass")
    for line in failures:
        print(f"does not pass: {line}", file=sys.stderr)
    return 1 if failures else 0


def _checked(
    operator: str, case: Case, dtype: str, request: str, options: argparse.Namespace
) -> Iterator[tuple[str, bool]]:
    """A line for each direction, and whether it passes."""
    name = f"{operator:16} {case.id:22} {dtype:9}"
    reason = refusal(operator, case, dtype, request, options.device)
    if reason:
        print(f"{name} not checked: {reason}", flush=True)
        return
    calls = contenders(operator, case, dtype, options.device, [request], ["plain"])
    served = served_by(operator, calls["forward"][request])
    try:
        hold(operator, served, case, dtype, options.device)
    except AssertionError as error:
        yield f"{name} by {served} is not close enough: {error}", False
        return
    finally:
        parity.expected.cache_clear()
        gc.collect()
    for direction, functions in calls.items():

        def times(seconds: float, functions: dict = functions) -> dict[str, float]:
            samples = timing.interleaved(functions, options.device, seconds)
            return {who: timing.median(laps) for who, laps in samples.items()}

        ratio = ratio_of(times, request, options.seconds)
        yield f"{name} {direction:16} {served:16} {ratio}", ratio.passes


def refusal(operator: str, case: Case, dtype: str, request: str, device: str) -> str:
    """Why there is nothing to compare; empty if there is."""
    if "plain" not in peers_of(operator, case):
        return "plain does not serve it"
    if not request:
        return ""
    return dispatch.why_not(request, parity.call_of(operator, case, dtype, device))


def served_by(operator: str, call: timing.Function) -> str:
    """The backend, and its form, that `explain` says of a call."""
    dispatch.forget_choices()
    call()
    choice = dispatch.explain(operator)[-1]
    return f"{choice.backend}:{choice.form}" if choice.form else choice.backend
