"""The folder that is measured, and its commit."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def commit() -> str:
    """The commit checked out now, which may change during a long run. Outside a repository, or
    where git refuses it, what PELT_COMMIT says, or `unknown`.
    """
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(git, text=True, capture_output=True, check=False)
    except FileNotFoundError:
        return os.environ.get("PELT_COMMIT", "unknown")
    return done.stdout.strip() or os.environ.get("PELT_COMMIT", "unknown")
