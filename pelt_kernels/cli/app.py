"""All commands as one typer application, and how one of them is run."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from .._version import __version__
from .compare import compare
from .demo import demo
from .distill import distill
from .export import export
from .gates import gates
from .info import info
from .join import join
from .launched import SECONDS_FOR_ERRORS, let_main_tell
from .methods import methods
from .predict import predict
from .train import train
from .train_options import usual_name

app = typer.Typer(
    name="pelt-kernels",
    help="Parameter-efficient tuning of transformers with fused kernels.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        print(f"pelt-kernels {__version__}")
        raise typer.Exit


@app.callback()
def _options_of_all(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    pass


app.command(context_settings={"token_normalize_func": usual_name})(train)
for command in (compare, predict, gates, export, join, distill, methods, info, demo):
    app.command()(command)

# The base of typer's errors of usage, under its public name in no version of typer.
_WrongUsage = typer.BadParameter.__base__


def run(arguments: Sequence[str] | None) -> int:
    """Runs one command and returns its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Characters that the console's encoding lacks are shown as escapes.
            stream.reconfigure(errors="backslashreplace")
    try:
        code = app(
            args=list(arguments) if arguments is not None else None,
            prog_name="pelt-kernels",
            standalone_mode=False,
        )
    except _WrongUsage as error:  # type: ignore[misc]
        context = getattr(error, "ctx", None)
        if context is not None and context.info_name == "train":
            let_main_tell(SECONDS_FOR_ERRORS)
        # The words in front of a wrong choice are pydantic's.
        sentence = error.format_message().replace(": Value error, ", ": ")
        print(f"pelt-kernels: {sentence}", file=sys.stderr)
        return 2
    return code if isinstance(code, int) else 0
