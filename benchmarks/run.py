"""Times every backend of the operators against what people write, peers, the reference, and
torch.compile of it.

    python -m benchmarks.run --op gated_adapter --device cpu [--cases quick|full|NAME,NAME]
                             [--backends cpu,eager] [--without triton,torch.compile]
                             [--dtypes float32,bfloat16] [--threads N] [--seconds S]
                             [--json FILE|DIR] [--resume] [--plot DIR]
    python -m benchmarks.run --check [--op ...] [--backend eager] [--dtypes ...] [--seconds S]

A backend is held to the closeness rule on a case before it is timed on it; one that fails gets no
row, and the command ends with 1. A case for which there is too little memory is one that failed.
Contenders take turns in one process. ``forward`` runs without gradients; ``forward+backward`` makes
the gradients of x and of everything that is trained. ``--plot`` measures the sweeps too and draws
how time grows with each size. ``--json`` with a folder names the file after the processor; the file
is written after each case, and with ``--resume`` only what it does not hold yet is measured and
added. ``--check`` is described in `benchmarks.check`.
"""

from __future__ import annotations

import argparse
import gc
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from pelt_kernels._hardware import hardware
from pelt_kernels.ops import BACKENDS, OPERATORS
from pelt_kernels.ops import _dispatch as dispatch
from pelt_kernels.ops._forms import DIRECTIONS

from . import check, roofline, shapes, timing
from .checkout import commit
from .contenders import COMPILED, SEED, baselines_of, contenders
from .from_tests import Case, parity
from .hold import hold
from .rows import Rows, read, write

DTYPES = {"cpu": "float32,bfloat16", "cuda": "bfloat16"}
BACKENDS_HELP = (
    "requests with commas, such as cuda:single or eager; by default all that users get, with "
    "--check what the dispatch chooses"
)


class UsageError(ValueError):
    """A request that cannot be measured; one sentence."""


def main(arguments: Sequence[str] | None = None) -> int:
    """0, 1 if a backend was not close enough or a check did not pass, 2 for a wrong request."""
    options = _parse(arguments)
    try:
        operators, cases = _check(options)
    except UsageError as error:
        print(f"benchmarks.run: {error}", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    rows: Rows = []
    failures: list[str] = []
    print(
        f"{_machine(options.device)}, torch {torch.__version__}, commit {commit()[:10]}",
        flush=True,
    )
    if options.check:
        return check.run(cases, options)
    earlier = read(options.json) if options.resume and options.json.is_file() else []
    points = {}
    try:
        for operator in operators:
            for dtype in options.dtypes.split(","):
                for case in cases[operator]:
                    measured = measure(operator, case, dtype, options, failures, earlier)
                    rows += measured
                    _print(measured)
                    if options.json:
                        write(options.json, earlier + rows)
        if options.plot:
            points = {operator: _sweep(operator, options, failures) for operator in operators}
        roofline.measure_again()
    except KeyboardInterrupt:
        failures.append("interrupted, so what was not measured yet is missing")
    for measured in (rows, *points.values()):
        _set_limits(measured, options.device)
    if options.json:
        write(options.json, earlier + rows)
    for operator, swept in points.items():
        if swept:
            from . import plots  # slow to import

            print(plots.draw_sweeps(operator, swept, options.plot))
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    return 1 if failures else 0


def measure(
    operator: str,
    case: Case,
    dtype: str,
    options: argparse.Namespace,
    failures: list[str],
    earlier: Rows = [],  # noqa: B006  nothing is added to it
) -> Rows:
    """The rows of one case: each backend that serves it and has none yet against each baseline."""
    done = {
        row["backend"]
        for row in earlier
        if (row["op"], row["case"], row["dtype"]) == (operator, case.id, dtype)
    }
    able = []
    defaults = {
        direction: default_of(operator, case, dtype, options.device, direction)
        for direction in DIRECTIONS.values()
    }
    for name in _requests(operator, defaults, options):
        if name in done:
            continue
        if refusal := parity.why_refused(operator, name, case, dtype):
            print(f"{operator:16} {case.id:22} {dtype:9} not by {name}: {refusal}")
            continue
        try:
            hold(operator, name, case, dtype, options.device)
            able.append(name)
        except (AssertionError, RuntimeError) as error:
            failures.append(_failure(operator, case, dtype, name, error))
    parity.expected.cache_clear()
    rows: Rows = []
    try:
        if able:
            rows = _timed(operator, case, dtype, options, able, defaults)
    except RuntimeError as error:
        failures.append(_failure(operator, case, dtype, ", ".join(able), error))
    torch.compiler.reset()
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()
    return rows


def _requests(operator: str, defaults: dict[str, str], options: argparse.Namespace) -> list[str]:
    """What is to be measured of an operator; what users get by default always is."""
    if options.backends:
        return list(options.backends)
    requests = backends_of(operator, options.device)
    for default in defaults.values():
        if not {default, dispatch.backend_of(default)} & set(requests):
            requests.append(default)
    return [r for r in requests if not {r, dispatch.backend_of(r)} & set(options.without)]


def _failure(operator: str, case: Case, dtype: str, name: str, error: Exception) -> str:
    """Said at once, because a run may be cut, and kept for the end."""
    told = f"{operator} {case.id} {dtype} {name}: {type(error).__name__}: {error}".splitlines()[0]
    print(f"failed: {told}", flush=True)
    return told


def _timed(
    operator: str,
    case: Case,
    dtype: str,
    options: argparse.Namespace,
    able: list[str],
    defaults: dict[str, str],
) -> Rows:
    """The rows of the backends that are close enough."""
    rows: Rows = []
    checked_out = commit()
    sizes = dict(parity.call_of(operator, case, dtype, options.device).sizes)
    least = roofline.work(operator, case, parity.PRECISIONS[dtype][0], options.device)
    against = [name for name in baselines_of(operator, case) if name not in options.without]
    calls = contenders(operator, case, dtype, options.device, able, against)
    for at, direction in enumerate(list(calls)):
        functions = calls.pop(direction)
        moved = sum(least.bytes[: at + 1])
        default = defaults[direction]
        served = default if default in able else dispatch.backend_of(default)
        _leave_out_what_does_not_fit(functions, able)
        ways: dict[str, str] = {}
        samples = timing.interleaved(functions, options.device, options.seconds, ways)
        us = {name: 1e6 * timing.median(seconds) for name, seconds in samples.items()}
        peak = {name: timing.peak_bytes(call, options.device) for name, call in functions.items()}
        host = {}
        if options.device == "cuda":
            host = {name: 1e6 * timing.host_seconds(call) for name, call in functions.items()}
        for backend in able:
            rows += [{
                "op": operator, "case": case.id, "sizes": sizes, "dtype": dtype,
                "direction": direction, "backend": backend, "is_default": backend == served,
                "baseline": baseline,
                "us": us[backend], "baseline_us": us[baseline],
                "speedup": us[baseline] / us[backend], "spread": timing.spread(samples[backend]),
                "bytes": moved, "gbps": moved / us[backend] / 1e3,
                "peak_bytes": peak[backend], "baseline_peak_bytes": peak[baseline],
                "timed_by": ways[backend], "baseline_timed_by": ways[baseline],
                "host_us": host.get(backend), "baseline_host_us": host.get(baseline),
                "hardware": _machine(options.device), "kind": kind_of(options.device),
                "torch": torch.__version__, "commit": checked_out,
            } for baseline in functions if baseline != backend]  # fmt: skip
    _set_limits(rows, options.device)
    return rows


def _leave_out_what_does_not_fit(functions: dict[str, timing.Function], able: list[str]) -> None:
    """Of what backends are timed against, those that this machine has no memory for."""
    for name in [name for name in functions if name not in able]:
        try:
            functions[name]()
        except torch.OutOfMemoryError as error:
            del functions[name]
            print(f"left out {name}: {error}".splitlines()[0], flush=True)


def backends_of(operator: str, device: str) -> list[str]:
    """Those that users get on this kind of device, neither the simulator nor an interpreter, in
    each of their forms.
    """
    return [
        request
        for name, backend in BACKENDS.items()
        if backend.is_automatic
        and name != "eager"
        and dispatch.has_file(operator, name)
        and device in backend.devices
        and not (name == "triton" and device == "cpu")
        and not parity.why_unavailable(operator, name)
        for request in dispatch.requests_of(operator, name)
    ]


def _sweep(operator: str, options: argparse.Namespace, failures: list[str]) -> Rows:
    """A row for each point of the sweeps, with the letter that grows and its value."""
    left_out = (*options.without, COMPILED, "reference")
    without = argparse.Namespace(**{**vars(options), "without": left_out})
    points: Rows = []
    for letter, cases in shapes.SWEEPS.get(operator, {}).items():
        for case in cases:
            size = _swept_size(case, letter)
            rows = measure(operator, case, options.dtypes.split(",")[0], without, failures)
            points += [{**row, "letter": letter, "size": size} for row in rows]
        _print([row for row in points if row["letter"] == letter])
    return points


def _swept_size(case: Case, letter: str) -> int:
    """The value of a letter of the case's name: 1024 of T1024-D768-R48."""
    return next(int(part[1:]) for part in case.id.split("-") if part[0] == letter)


def _print(rows: Rows) -> None:
    for row in rows:
        print(
            f"{row['op']:16} {row['case']:22} {row['dtype']:9} {row['direction']:16} "
            f"{row['backend']:16} {row['us']:10,.0f} us  {row['speedup']:5.2f}x "
            f"{row['baseline']:14} spread {row['spread']:4.0%}"
            f"  limit {row['limit_us'] / row['us']:4.0%}"
            f"  peak {row['peak_bytes'] / max(row['baseline_peak_bytes'], 1):5.2f}x",
            flush=True,
        )


def default_of(operator: str, case: Case, dtype: str, device: str, direction: str) -> str:
    """The request that names what the dispatch chooses by itself, with its form."""
    needs_grad = direction == DIRECTIONS[True]
    call = parity.call_of(operator, case, dtype, device)
    return dispatch.select(call, "", needs_grad).choice.served


def _set_limits(rows: Rows, device: str) -> None:
    """Each row's least time, by what is known of the machine until now."""
    for row in rows:
        every = [*shapes.cases_of(row["op"], device), *shapes.swept(row["op"])]
        case = next(case for case in every if case.id == row["case"])
        dtype = parity.PRECISIONS[row["dtype"]][0]
        work = roofline.work(row["op"], case, dtype, device)
        forward, both = roofline.least_seconds(work, dtype, device)
        row["limit_us"] = 1e6 * (forward if row["direction"] == "forward" else both)


def kind_of(device: str) -> str:
    """What rows of this machine may be compared with: rows of the same kind."""
    machine = hardware()
    return machine["gpu"] if device == "cuda" else machine["kind"]


def file_in(folder: Path, device: str) -> Path:
    """Where a folder keeps the rows of this kind of machine."""
    words = re.sub(r"[^a-z0-9]+", "_", kind_of(device).lower()).strip("_")
    return folder / f"operators_{device}_{words}.jsonl"


def _machine(device: str) -> str:
    machine = hardware()
    if device == "cuda":
        return machine["gpu"]
    return f"{machine['cpu']}, {machine['threads']} thread(s)"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--op", default=",".join(OPERATORS), help="operators, with commas")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", default="quick", help="quick, full, or names with commas")
    parser.add_argument("--backends", "--backend", default="", help=BACKENDS_HELP)
    parser.add_argument("--check", action="store_true", help="is it as fast as what people write?")
    parser.add_argument("--dtypes", help="of the activations, with commas")
    parser.add_argument("--threads", type=int, help="of the CPU; all of them by default")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each contender and case")
    parser.add_argument("--without", default="", help="backends and baselines to leave out")
    parser.add_argument("--no-compile", action="store_true",
                        help="leave out torch.compile, slow to start")  # fmt: skip
    parser.add_argument("--json", type=Path, help="file for the rows, or a folder")
    parser.add_argument("--resume", action="store_true", help="measure what --json has no row of")
    parser.add_argument("--plot", type=Path, help="folder for the plots of the sweeps")
    options = parser.parse_args(arguments)
    options.dtypes = options.dtypes or DTYPES.get(options.device, "float32")
    options.backends = options.backends.split(",") if options.backends else []
    options.without = (*options.without.split(","), *[COMPILED] * options.no_compile)
    if options.json and options.json.is_dir():
        options.json = file_in(options.json, options.device)
    return options


def _check(options: argparse.Namespace) -> tuple[list[str], dict[str, list[Case]]]:
    """The operators and their cases. Raises UsageError before any work."""
    operators = options.op.split(",")
    for operator in operators:
        if operator not in OPERATORS:
            raise UsageError(f"--op: expected some of {', '.join(OPERATORS)}, got '{operator}'")
    if options.device not in DTYPES:
        raise UsageError(f"--device: expected cpu or cuda, got '{options.device}'")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: expected a CUDA GPU that torch sees, found none; use cpu")
    for dtype in options.dtypes.split(","):
        if dtype not in parity.PRECISIONS:
            known = ", ".join(parity.PRECISIONS)
            raise UsageError(f"--dtypes: expected some of {known}, got '{dtype}'")
    for option, folder in (
        ("--json", options.json and options.json.parent),
        ("--plot", options.plot),
    ):
        if folder and not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise UsageError(f"{option}: expected a folder that can be written to, got '{folder}'")
    if options.resume and not options.json:
        raise UsageError("--resume: expected --json with the file to add to")
    if options.check and (options.json or options.plot):
        raise UsageError("--check: writes no rows and draws nothing; leave --json and --plot out")
    for name in options.backends:
        try:
            dispatch.check_name(name)
        except ValueError as error:
            raise UsageError(f"--backends: {error}") from None
    return operators, {operator: _chosen(operator, options) for operator in operators}


def _chosen(operator: str, options: argparse.Namespace) -> list[Case]:
    every = shapes.cases_of(operator, options.device)
    if options.device == "cuda":  # where a run may be cut, the large ones are lost and not the rest
        every.sort(key=lambda case: shapes.entries(operator, case))
    if options.cases in ("quick", "full"):
        return [case for case in every if case.is_quick or options.cases == "full"]
    named = {case.id: case for case in every}
    missing = [name for name in options.cases.split(",") if name not in named]
    if missing:
        raise UsageError(
            f"--cases: expected quick, full or some of {operator}'s {', '.join(named)}, got"
            f" '{missing[0]}'"
        )
    return [named[name] for name in options.cases.split(",")]


if __name__ == "__main__":
    sys.exit(main())
