"""What `pelt-kernels compare` has left in a folder, into benchmarks/results and its page.

    pelt-kernels compare --task ... --output runs/compare
    python -m benchmarks.compare_table runs/compare

A row for each task, number of training examples and method, with the processor and the commit; what
is not finished is left out. Rows that are there of other tasks, numbers and methods stay, so that a
comparison can be done piece by piece, under the same settings; so do rows whose scores are the same
again, with the commit that first reached them. Where the runs were done at another commit than the
one checked out now, `--commit` says which.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pelt_kernels.training import UsageError
from pelt_kernels.training.compare import report

from . import compared, readme
from .checkout import commit
from .rows import read, write


def main(arguments: Sequence[str] | None = None) -> int:
    """Replaces the rows of the same cells, and rewrites the page and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="the --output of the comparison")
    parser.add_argument("--commit", help="of its runs; default the one checked out")
    parser.add_argument("--anew", action="store_true", help="drop the rows that are there")
    options = parser.parse_args(arguments)
    try:
        summary = report(options.folder)
    except UsageError as error:
        print(f"compare_table: {error}", file=sys.stderr)
        return 2
    conditions = {name: summary[name] for name in compared.SHARED}
    conditions["settings"] = {
        name: value
        for name, value in conditions["settings"].items()
        if name not in ("tasks", "fingerprints")  # paths are of the machine that measured
    }
    made = {"commit": options.commit or commit()} | conditions
    parameters = summary["parameters"]
    rows = [cell | {"parameters": parameters[cell["method"]]} | made for cell in summary["cells"]]
    there = [] if options.anew or not compared.RESULTS.is_file() else read(compared.RESULTS)
    if other := compared.difference([*there, *rows]):
        print(
            f"compare_table: expected the settings of the rows that are there, got {other}; "
            "--anew drops those rows",
            file=sys.stderr,
        )
        return 2
    compared.RESULTS.parent.mkdir(exist_ok=True)
    write(compared.RESULTS, compared.joined(there, rows))
    readme.main()
    return 0


if __name__ == "__main__":
    sys.exit(main())
