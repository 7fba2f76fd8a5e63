"""Which of several processes of `train` speaks, as a distributed launcher tells each of them."""

from __future__ import annotations

import os
import time

# Where the main process fails, too, it has told so and the launcher has ended this one long before.
SECONDS_FOR_ERRORS, SECONDS_FOR_SIGNALS = 30, 2


def is_main() -> bool:
    """Whether this process has no number, or is the first."""
    return os.environ.get("RANK", "0") == "0"


def let_main_tell(seconds: float) -> None:
    """Keeps any other process from ending before the main one has: the launcher ends all once it
    sees one end, and what the main process has to say would be lost.
    """
    if not is_main():
        time.sleep(seconds)
