"""The command `pelt-kernels`: train, compare, predict, gates, export, join, distill, methods, info,
demo."""

from __future__ import annotations

import os
from collections.abc import Sequence

from .signals import end_at_once, signals_handled_by


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1, 2 for wrong usage, 130 and 143 for
    signals. Without `arguments` the process is the command, and its signals end it for good.
    """
    # OpenMP reads it when torch loads, which the commands do. Threads that spin while they wait
    # take the processor from other processes: with two busy ones beside it, a step of
    # the linear probe on two cores took nine times as long (3.1 s against 0.35 s).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    with signals_handled_by(end_at_once, for_good=arguments is None):
        from .app import run

        return run(arguments)
