"""The three ways a run ends early, each with one sentence meant for a person."""

from __future__ import annotations

import signal


class UsageError(ValueError):
    """What was asked for cannot be done as asked: a missing file, an absent column, an unknown label or name."""


class RunError(RuntimeError):
    """The request was sound but the run cannot go on: a damaged checkpoint, a full disk, a loss that is not a number."""


class Interrupted(RunError):
    """A signal asked the run to stop."""

    def __init__(self, number: int, sentence: str):
        super().__init__(sentence)
        self.number = number

    @property
    def exit_code(self) -> int:
        """What shells report for a process ended by this signal: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number

    @property
    def signal_name(self) -> str:
        return signal.Signals(self.number).name
