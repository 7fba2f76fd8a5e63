"""Installs an sdist or a wheel into an empty environment and does there what a reader of the README
does first: its code, on a tiny model, and the command.

    python python_tests/install_check.py FILE [FILE ...]

Of a wheel the environment sees no compiler, and its own programs alone. A line for each step; ends
with 1 at the first that fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
# A CUDA wheel is larger by its kernels; PyPI takes 100 MB of a file.
MOST_BYTES = {"wheel": 10_000_000, "sdist": 5_000_000}
FIRST_LINES = HERE / "first_lines.py"


def kind_of(file: Path) -> str:
    """``wheel`` or ``sdist``. Raises ValueError."""
    if not file.is_file():
        raise ValueError(f"expected an sdist or a wheel, got {file}, and there is no such file")
    if file.suffix == ".whl":
        return "wheel"
    if file.name.endswith(".tar.gz"):
        return "sdist"
    raise ValueError(f"expected a file that ends in .whl or .tar.gz, got {file.name}")


def check_size(file: Path) -> None:
    """Prints the size. Raises ValueError where it is above the limit."""
    size, most = file.stat().st_size, MOST_BYTES[kind_of(file)]
    if size > most:
        raise ValueError(f"{file.name}: expected at most {most:,} bytes, got {size:,}")
    print(f"{file.name}: {size:,} bytes, at most {most:,}", flush=True)


def check(file: Path) -> None:
    """All steps for one file. Raises ValueError."""
    check_size(file)
    with tempfile.TemporaryDirectory() as folder:
        environment = Path(folder) / "environment"
        venv.create(environment, with_pip=True)
        programs = str(environment / "bin")
        is_sdist = kind_of(file) == "sdist"
        path = os.pathsep.join([programs, os.environ["PATH"]]) if is_sdist else programs
        settings = {name: value for name, value in os.environ.items() if "PYTHON" not in name}
        settings |= {"PATH": path, "OMP_NUM_THREADS": "1"}
        python = f"{programs}/python"
        steps: dict[str, Sequence[str | Path]] = {
            # The README's first lines are about PEFT's models.
            "installs": [python, "-m", "pip", "install", "-q", "--no-compile", file, "peft"],
            "runs the README's code": [python, FIRST_LINES],
            "has the command": [f"{programs}/pelt-kernels", "info"],
        }
        for name, command in steps.items():
            _run(name, command, folder, settings)


def _run(
    name: str, command: Sequence[str | Path], folder: str, settings: Mapping[str, str]
) -> None:
    done = subprocess.run(
        command, cwd=folder, env=dict(settings), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ValueError(f"{name}: no, {command[0]} ended with {done.returncode}\n{done.stderr}")
    last = done.stdout.strip().splitlines()[-1:] if name.startswith("runs") else []
    print(": ".join([f"  {name}", *(last or ["yes"])]), flush=True)


def main(arguments: Sequence[str]) -> int:
    """0, or 1 with a sentence."""
    files = [Path(name).resolve() for name in arguments]
    try:
        if not files:
            raise ValueError("expected sdists or wheels, got none")
        for file in files:
            kind_of(file)
        for file in files:
            check(file)
    except ValueError as error:
        print(f"install_check: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
