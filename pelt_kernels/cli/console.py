"""What every command shares: its two consoles, and one sentence in place of a traceback."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console

from .launched import SECONDS_FOR_ERRORS, SECONDS_FOR_SIGNALS, is_main, let_main_tell
from .signals import signals_handled_by

Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks, warnings and debug logs.")]


def results() -> Console:
    """Stdout, for the results of a command."""
    return Console(highlight=False)


def notes() -> Console:
    """Stderr, for progress and remarks, which must not get into a pipe."""
    return Console(stderr=True, highlight=False)


@contextmanager
def errors_in_one_line(debug: bool, in_processes: bool = False) -> Iterator[None]:
    """Ends the command with one sentence and an exit code on any error; `debug` lets it pass. With
    `in_processes` the command is one of several processes, which have most errors in common.
    """
    from ..ops import BackendError
    from ..training.errors import Interrupted, RunError, UsageError
    from ..training.machine import check_environment

    def interrupt(number: int, _frame: FrameType | None = None) -> None:
        raise Interrupted(number)

    try:
        with signals_handled_by(interrupt), _quiet(debug):
            check_environment()
            yield
    except (UsageError, RunError, Interrupted, BackendError) as error:
        if debug:
            raise
        is_signal = isinstance(error, Interrupted)
        if in_processes:
            let_main_tell(SECONDS_FOR_SIGNALS if is_signal else SECONDS_FOR_ERRORS)
        if not (in_processes and is_signal) or is_main():
            print(f"pelt-kernels: {error}", file=sys.stderr)
        code = error.exit_code if isinstance(error, Interrupted) else 1
        raise typer.Exit(2 if isinstance(error, UsageError) else code) from None
    except BrokenPipeError:
        sys.stderr.close()  # the reader has closed the pipe: no message would arrive
        raise typer.Exit(1) from None
    except typer.Exit:
        raise
    except Exception as error:
        if debug:
            raise
        if in_processes:
            let_main_tell(SECONDS_FOR_ERRORS)
        first = (str(error).strip().splitlines() or ["no message"])[0]
        print(
            f"pelt-kernels: unexpected {type(error).__name__}: {first} (--debug shows where)",
            file=sys.stderr,
        )
        raise typer.Exit(1) from None


@contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Silences the progress bars, logs and warnings of libraries unless `debug`."""
    from transformers.utils import logging as transformers_logging

    if debug:
        logging.basicConfig(level=logging.INFO)
        yield
        return
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        transformers_logging.enable_progress_bar()
