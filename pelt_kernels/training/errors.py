"""The three ways a run ends early, each with one sentence meant for a person."""

from __future__ import annotations

import signal


class UsageError(ValueError):
    """What was asked for cannot be done as asked: a missing file, an absent column, an unknown
    label or name."""


class RunError(RuntimeError):
    """The request was sound but the run cannot go on: a damaged checkpoint, a full disk, a loss
    that is not a number."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the run to stop. Like Ctrl-C it passes through every `except Exception`."""

    def __init__(self, number: int, sentence: str = ""):
        super().__init__(sentence or f"stopped by {signal.Signals(number).name}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """What shells report for a process ended by this signal: 130 for Ctrl-C, 143 for
        SIGTERM.
        """
        return 128 + self.number


def reason(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
