"""The command `pelt-kernels`: train, predict, export, info, demo."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import typer

from .demo import demo
from .export import export
from .info import info
from .predict import predict
from .train import train

app = typer.Typer(
    name="pelt-kernels",
    help="Parameter-efficient tuning of transformers with fused kernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (train, predict, export, info, demo):
    app.command()(command)

# The base of typer's errors of usage, under its public name in no version of typer.
_WrongUsage = typer.BadParameter.__base__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1, 2 for wrong usage, 130 and 143 for
    signals.
    """
    # OpenMP reads it when torch loads, which the commands do. Threads that spin while they wait
    # take the processor from whoever else needs it: with two busy processes beside it, a step of
    # the linear probe on two cores took nine times as long (3.1 s against 0.35 s).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        code = app(
            args=list(arguments) if arguments is not None else None,
            prog_name="pelt-kernels",
            standalone_mode=False,
        )
    except _WrongUsage as error:  # type: ignore[misc]
        print(f"pelt-kernels: {error.format_message()}", file=sys.stderr)
        return 2
    return code if isinstance(code, int) else 0
