"""The folder that is measured, and its commit."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def commit() -> str:
    """The commit checked out now, which may change during a long run; `unknown` outside a
    repository.
    """
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    done = subprocess.run(git, text=True, capture_output=True, check=False)
    return done.stdout.strip() or "unknown"
