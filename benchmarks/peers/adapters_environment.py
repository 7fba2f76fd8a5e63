"""An environment with AdapterHub's library `adapters`, which asks for an older transformers.

    python -m benchmarks.peers.adapters_environment FOLDER

It has this Python and this torch, so that this project's compiled modules load in it.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from importlib.metadata import version
from pathlib import Path

ADAPTERS = "1.3.0"


def main() -> int:
    """Makes it, or brings it up to date."""
    if len(sys.argv) != 2:
        print((__doc__ or "").partition("\n\n")[2], file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    venv.create(folder, with_pip=True)
    torch = version("torch").partition("+")[0]
    wanted = [f"adapters=={ADAPTERS}", f"torch=={torch}"]
    return subprocess.run([folder / "bin" / "pip", "install", *wanted], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
