"""What the CUDA kernels issue and move, and the least time that this takes each pipe of three GPUs,
before and after a change.

    python -m benchmarks.predictions --count after [--op NAME,NAME]
    python -m benchmarks.predictions [--module build/cuda/pelt_kernels/_C*.so]

``--count`` counts on the simulator, case by case, into benchmarks/results/counters_<name>.jsonl.
Rows of the commit that is checked out stay and others are counted anew, so it can be stopped and
started again. Without it benchmarks/results/predictions_h200.md is written from both files; with
``--module`` it also tells what machine code each kernel is, as cuobjdump reads it.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.resources import files
from math import exp, log
from pathlib import Path
from typing import Any, NamedTuple

from pelt_kernels.ops import OPERATORS
from pelt_kernels.ops import _dispatch as dispatch

from . import counters, pipes, roofline, shapes
from .checkout import ROOT, commit
from .from_tests import Case, parity
from .rows import Rows, commits, read, write

RESULTS = ROOT / "benchmarks" / "results"
PAGE = RESULTS / "predictions_h200.md"
BEFORE, AFTER = "before", "after"
DTYPE = "bfloat16"
GPUS = ("H200", "H100", "A100")
# Warp instructions by `counters.estimate`: up to a minute each where nothing else runs.
LARGEST = 140e6
WHAT = (
    "This page holds counts of the PTX instructions that the CUDA kernels issue on the simulator, "
    "facts of the machine code that ptxas makes of them, and lower bounds from the counts by the "
    "rates of each GPU's pipes. It is not a measurement: no GPU has run these kernels."
)
HOW = """\
- Each cell is before and, behind the arrow, after; one figure alone is of both, or of the one that
  was counted.
- `issued`: warp instructions; `L2` and `memory`: bytes that blocks, and that the launches, touch at
  least; `least`: bytes that have to be moved; `wavefronts`: passes through shared memory; `mma`:
  products of 16 x 8 x 16.
- The time of a pipe is its work over its rate (`benchmarks/pipes.py`), on the multiprocessor with
  the most blocks; launches stand one after the other. The bound is the sum of what bounds each
  launch. Latency, occupancy and what the assembler makes of PTX are not in it: no kernel is faster
  than its bound, and the bound promises no speed.
- `composed` forms leave products to torch, whose kernels are not counted.
- Larger cases of `benchmarks/shapes.py` take the simulator too long.
"""
COUNTED = ("HMMA", "LDGSTS", "LDSM", "LDG", "STG", "BAR", "MUFU", "LDL", "STL")
Key = tuple[str, str, str, str]


def file_of(name: str) -> Path:
    """Where the counts of before or of after are kept."""
    return RESULTS / f"counters_{name}.jsonl"


def counted_cases(operator: str) -> Iterator[tuple[Case, str]]:
    """The cases of a GPU that are not too large, each with every form that serves it."""
    for case in shapes.cases_of(operator, "cuda"):
        if 2 * shapes.entries(operator, case) > LARGEST or _estimate(operator, case) > LARGEST:
            continue
        for request in dispatch.every_request(operator, "cuda_sim"):
            if not parity.why_refused(operator, request, case, DTYPE):
                yield case, request


def _estimate(operator: str, case: Case) -> float:
    return counters.estimate(roofline.work(operator, case, parity.PRECISIONS[DTYPE][0]))


def count(operators: Sequence[str], path: Path) -> None:
    """Counts what the file does not hold of this commit, and writes it after each case."""
    rows = read(path) if path.is_file() else []
    now = commit()
    for operator in operators:
        cases = list(counted_cases(operator))
        served = {(operator, case.id, request) for case, request in cases}
        rows = [row for row in rows if row["op"] != operator or _of(row) in served]
        for case, request in cases:
            key = (operator, case.id, request)
            if any(_of(row) == key and row["commit"] == now for row in rows):
                continue
            found, _ = counters.counted(operator, case, DTYPE, request, GPUS)
            rows = [row for row in rows if _of(row) != key] + found
            write(path, rows)
            print(*key, f"{sum(row['issued'] for row in found):,} issued", flush=True)


def _of(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["op"], row["case"], row["request"]


class Pair(NamedTuple):
    """A row of before and one of after; None where there is none."""

    before: dict[str, Any] | None
    after: dict[str, Any] | None

    @property
    def one(self) -> dict[str, Any]:
        """Of both the newer, for what they have in common."""
        row = self.after or self.before
        assert row is not None
        return row

    def cell(self, figure: str, *path: str) -> str:
        """What lies under a path, of both in a format."""
        shown = [_under(row, path).__format__(figure) for row in self if row is not None]
        return " → ".join(shown if len(set(shown)) > 1 else shown[:1])


def _under(row: dict[str, Any], path: Sequence[str]) -> Any:
    value: Any = row
    for name in path:
        value = value[name]
    return value


def paired(before: Rows, after: Rows) -> dict[Key, Pair]:
    """Rows of the same call and direction, in the order of the first."""

    def key(row: dict[str, Any]) -> Key:
        return row["op"], row["case"], row["request"], row["direction"]

    old, new = ({key(row): row for row in rows} for rows in (before, after))
    return {name: Pair(old.get(name), new.get(name)) for name in {**old, **new}}


def page(before: Rows, after: Rows, module: Path | None = None) -> str:
    """The whole page, in Markdown."""
    pairs = paired(before, after)
    both = before and after
    lines = ["# What the CUDA kernels do, counted", "", WHAT, "", HOW]
    for name, rows in ((BEFORE, before), (AFTER, after)):
        if rows:
            lines.append(f"`{name}` is commit {commits(rows)}, all in {DTYPE}.  ")
    if both:
        lines += ["", "## After over before", "", *_overall(pairs)]
    for operator in OPERATORS:
        of_operator = [pair for key, pair in pairs.items() if key[0] == operator]
        if of_operator:
            lines += ["", f"## {operator}", "", *_counts(of_operator)]
            for gpu in GPUS:
                lines += ["", f"Least time of each pipe on {gpu}, in microseconds:", ""]
                lines += _times(of_operator, gpu)
    if module:
        lines += ["", "## Machine code for sm_90", "", *_machine_code(module)]
    return "\n".join(lines) + "\n"


def _overall(pairs: dict[Key, Pair]) -> Iterator[str]:
    """Geometric means over the cases that are in both."""
    yield f"| operator | direction | cases | issued | bound on {' | bound on '.join(GPUS)} |"
    yield "|---" * (4 + len(GPUS)) + "|"
    groups: dict[tuple[str, str], list[Pair]] = {}
    for (operator, _, _, direction), pair in pairs.items():
        if pair.before and pair.after:
            groups.setdefault((operator, direction), []).append(pair)
    for (operator, direction), group in groups.items():
        paths = [("issued",), *(("bounds", gpu, "us") for gpu in GPUS)]
        means = " | ".join(f"{_mean_ratio(group, path):.2f}x" for path in paths)
        yield f"| `{operator}` | {direction} | {len(group)} | {means} |"


def _mean_ratio(group: Sequence[Pair], path: Sequence[str]) -> float:
    logs = [log(_under(new, path) / _under(old, path)) for old, new in group if old and new]
    return exp(sum(logs) / len(logs))


def _counts(pairs: Sequence[Pair]) -> Iterator[str]:
    columns = {
        "launches": "launches", "issued": "issued", "L2": "cache_bytes", "memory": "memory_bytes",
        "least": "least_bytes", "wavefronts": "wavefronts", "mma": "mma",
    }  # fmt: skip
    yield f"| case | direction | form | {' | '.join(columns)} |"
    yield "|---" * (3 + len(columns)) + "|"
    for pair in pairs:
        cells = [pair.cell(",", name) for name in columns.values()]
        yield f"{_name(pair)} | {' | '.join(cells)} |"


def _times(pairs: Sequence[Pair], gpu: str) -> Iterator[str]:
    yield f"| case | direction | form | {' | '.join(pipes.PIPES)} | bound | by |"
    yield "|---" * (5 + len(pipes.PIPES)) + "|"
    for pair in pairs:
        cells = [pair.cell(",.1f", "bounds", gpu, "pipes", pipe) for pipe in pipes.PIPES]
        cells += [pair.cell(",.1f", "bounds", gpu, "us"), pair.cell("", "bounds", gpu, "by")]
        yield f"{_name(pair)} | {' | '.join(cells)} |"


def _name(pair: Pair) -> str:
    row = pair.one
    form = row["request"].partition(":")[2] or "–"
    return f"| {row['case']} | {row['direction']} | {form}"


def _machine_code(module: Path) -> Iterator[str]:
    resources = resources_in(_cuobjdump("-res-usage", module))
    codes = codes_in(_cuobjdump("-sass", module))
    yield f"| kernel | instructions | registers | stack | {' | '.join(COUNTED)} |"
    yield "|---" * (4 + len(COUNTED)) + "|"
    for name, counts in sorted(codes.items()):
        used = resources.get(name, {})
        cells = [counts["all"], used.get("REG", "–"), used.get("STACK", "–")]
        cells += [counts[word] for word in COUNTED]
        yield f"| `{_readable(name)}` | {' | '.join(map(str, cells))} |"


def _cuobjdump(what: str, module: Path) -> str:
    tool = shutil.which("cuobjdump") or str(files("triton") / "backends/nvidia/bin/cuobjdump")
    command = [tool, what, "-arch", "sm_90", str(module)]
    return subprocess.run(command, text=True, capture_output=True, check=True).stdout


def codes_in(text: str) -> dict[str, Counter[str]]:
    """Kernel -> how many of each counted instruction its code holds, and of all."""
    by_kernel: dict[str, Counter[str]] = {}
    counts: Counter[str] = Counter()
    for line in text.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            counts = by_kernel.setdefault(match[1], Counter())
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z]\w*)", line):
            counts["all"] += 1
            counts[match[1]] += 1
    return by_kernel


def resources_in(text: str) -> dict[str, dict[str, int]]:
    """Kernel -> its registers (REG), bytes of stack (STACK) and what else is told of it."""
    pattern = r"Function (\S+):\s*\n\s*(.*)"
    return {
        name: {word: int(n) for word, n in re.findall(r"(\w+)(?:\[\d+\])?:(\d+)", rest)}
        for name, rest in re.findall(pattern, text)
    }


def _readable(name: str) -> str:
    """fwd_sm80<Config<bf16, 64>> of a mangled name."""
    plain = subprocess.run(["c++filt", name], text=True, capture_output=True, check=True).stdout
    plain = re.sub(r"\(anonymous namespace\)::|pelt::|void |\(\w+\)(?=\d)", "", plain.strip())
    return plain[: plain.rfind("(")]


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 2 for a wrong request."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--count", choices=(BEFORE, AFTER), help="counts instead of writing a page")
    parser.add_argument("--op", default=",".join(OPERATORS), help="operators to count, with commas")
    parser.add_argument("--module", type=Path, help="a _C with the CUDA kernels")
    options = parser.parse_args(arguments)
    operators = options.op.split(",")
    if unknown := [name for name in operators if name not in OPERATORS]:
        print(f"benchmarks.predictions: --op: no operator '{unknown[0]}'", file=sys.stderr)
        return 2
    if options.count:
        count(operators, file_of(options.count))
        return 0
    before, after = (
        read(file_of(name)) if file_of(name).is_file() else [] for name in (BEFORE, AFTER)
    )
    PAGE.write_text(page(before, after, options.module))
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
