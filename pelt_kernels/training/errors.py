"""The errors that end a run early, each with one sentence for a person."""

from __future__ import annotations

import signal
from collections.abc import Sequence


class UsageError(ValueError):
    """A request that cannot be served: a missing file, an absent column, an unknown label or
    name."""


class RunError(RuntimeError):
    """The request is valid but the run cannot go on: a damaged checkpoint, a full disk, a loss
    that is not a number."""


class DivergedError(RunError):
    """Training has left the finite numbers, which another learning rate may prevent."""


class Interrupted(KeyboardInterrupt):
    """A signal ends the run. Like Ctrl-C it passes through every `except Exception`."""

    def __init__(self, number: int, sentence: str = ""):
        super().__init__(sentence or f"stopped by {signal.Signals(number).name}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """What shells report for a process ended by this signal: 130 for Ctrl-C, 143 for
        SIGTERM.
        """
        return 128 + self.number


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Raises UsageError unless the value is known."""
    if value not in known:
        raise UsageError(f"{name}: expected one of {', '.join(known)}, got '{value}'")


def reason(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
