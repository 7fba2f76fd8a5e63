"""`pelt-kernels join`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import Debug, errors_in_one_line, results


def join(
    adapters: Annotated[list[Path], typer.Argument(help="Folders of VLM adapters, two or more.")],
    output: Annotated[Path, typer.Option(help="A new folder for the adapter of all their tasks.")],
    debug: Debug = False,
) -> None:
    """Join adapters for one model that were trained apart, each for its tasks, into one."""
    with errors_in_one_line(debug):
        from ..models.join import join_adapters
        from ..training import RunError, UsageError

        try:
            config = join_adapters(adapters, output)
        except (ValueError, FileNotFoundError) as error:
            raise UsageError(str(error)) from error
        except OSError as error:
            raise RunError(f"output: {output} cannot be written ({error.strerror})") from error
        names = ", ".join(
            f"{task} ({size})" for task, size in zip(config.tasks, config.bottleneck_of_each())
        )
        results().print(f"{names}: {output}", markup=False)
