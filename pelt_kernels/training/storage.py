"""Writing files so that a reader sees the old or the new content and nothing between, and errors
before the work where a folder cannot be written.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import RunError, reason

LOCK_FILE = ".lock"
_PARTIAL = ".partial-"


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file whole or not at all. Raises RunError."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a name beside `path` to write a file or folder under; afterwards that takes the place
    of `path`.

    If the block raises, what was at `path` is still there. A write that failed raises RunError with
    the reason.
    """
    partial = path.with_name(f"{_PARTIAL}{os.getpid()}-{path.name}")
    _remove(partial)
    try:
        yield partial
        _flush(partial)
        if path.is_dir():
            # A folder cannot be replaced in one step; its new content is already on the disk.
            shutil.rmtree(path)
        os.replace(partial, path)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        _remove(partial)


@contextmanager
def claimed(folder: Path, waiting: Callable[[str], None] | None = None) -> Iterator[None]:
    """Holds a folder, which is there, for one writer until the block or the process ends, however
    that comes about. Readers are not kept out.

    Raises RunError where its file system has no locks, and at once where another holds it; with
    `waiting`, which gets a sentence, it waits for the other.
    """
    lock = FileLock(folder / LOCK_FILE)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if waiting is None:
                raise
            waiting(f"output: waiting for the run that is writing in {folder}")
            lock.acquire()
    except Timeout as error:
        raise RunError(
            f"output: another run is writing in {folder}; wait for its end (--wait), or name "
            "another --output"
        ) from error
    except (OSError, NotImplementedError) as error:
        raise RunError(
            f"output: {folder} cannot be locked against a second run ({reason(error)}); name an "
            "--output elsewhere"
        ) from error
    try:
        yield
    finally:
        lock.release()


def share(folder: Path) -> None:
    """Gives every file the permissions of a plain open(); safetensors makes private ones."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~umask)


def clear_partial(folder: Path) -> None:
    """Removes what a killed process left half written in `folder`."""
    for path in folder.glob(f"{_PARTIAL}*"):
        _remove(path)


def require_writable(folder: Path, needed_bytes: int = 0) -> None:
    """Makes `folder`; raises RunError where it cannot be written or its disk has less than
    `needed_bytes` free.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=_PARTIAL):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        raise RunError(f"output: {folder} cannot be written ({error.strerror or error})") from error
    if free < needed_bytes:
        raise RunError(
            f"output: the run needs about {needed_bytes / 2**20:,.0f} MiB under {folder}, "
            f"{free / 2**20:,.0f} MiB are free"
        )


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Brings a file, or every file of a folder, to the disk, so that the rename after it never
    comes first.
    """
    for file in (
        [path] if path.is_file() else [inner for inner in path.rglob("*") if inner.is_file()]
    ):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
