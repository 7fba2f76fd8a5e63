"""What Ctrl-C and SIGTERM do, from the first moment. Nothing here takes time to load."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from .launched import is_main

NUMBERS = (signal.SIGINT, signal.SIGTERM)


def end_at_once(number: int, _frame: FrameType | None = None) -> None:
    """Ends the process with one line. For the time before and after a command's work, when there is
    nothing to clear away: an exception would come out of the middle of another library's import.
    """
    if is_main():
        os.write(2, f"pelt-kernels: stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


@contextmanager
def signals_handled_by(
    handler: Callable[[int, FrameType | None], Any], for_good: bool = False
) -> Iterator[None]:
    """Has `handler` called on SIGINT and SIGTERM in the block; with `for_good` also after it.
    Outside the main thread, where Python allows no handler, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in NUMBERS}
    try:
        yield
    finally:
        for number, previous in before.items():
            if not for_good and previous is not None:  # None: not set from Python
                signal.signal(number, previous)
