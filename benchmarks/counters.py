"""Counts what the CUDA kernels of an operator do, on the simulator: instructions, sectors and
wavefronts, and the least time that these take the pipes of a GPU.

    python -m benchmarks.counters --op gated_adapter [--case T1024-D768-R48] [--dtype bfloat16]
                                  [--direction forward|backward] [--request cuda_sim:single]
                                  [--gpus A100,H100,H200] [--json FILE]
    python -m benchmarks.counters --record

These are counts of PTX and a lower bound, not a measurement. Without ``--case`` the operator's
quick benchmark shapes are counted but for those that take too long, which are named. ``--record``
writes the small table that the tests hold every operator's kernels to.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pelt_kernels.ops import OPERATORS, _native
from pelt_kernels.ops import _dispatch as dispatch
from pelt_kernels.ops._dispatch import contract_of

from . import counters_report, pipes, roofline, shapes
from .checkout import ROOT, commit
from .contenders import SEED, differentiable, trainable
from .from_tests import Case, cases, parity
from .instructions import NAMES, family_of, is_folded
from .pipes import ALIKE, GPUS, Launch
from .rows import Rows, read, write

RECORDED = ROOT / "python_tests" / "counters.jsonl"
RECORDED_DTYPE, RECORDED_GPU = "bfloat16", "H100"
DIRECTIONS = ("forward", "backward")
LONGEST = (
    20e6  # warp instructions of forward and backward, about; more take more than half a minute
)


def count(operator: str, case: Case, dtype: str, request: str, gpu: str) -> dict[str, list[Launch]]:
    """Direction -> the launches of one call, as they would be on this GPU."""
    simulator = _native.library("_C_sim")
    contract = contract_of(operator).CONTRACT
    attributes = cases.make_attributes(contract, case)
    values = parity.inputs_of(operator, case, dtype)
    inputs, leaves = trainable(operator, values)
    signature = contract.bind(values, attributes)
    found: dict[str, list[Launch]] = {}
    try:
        _forget(signature)  # plans hold sizes that depend on the device
        simulator.set_device(gpu)
        simulator.start_counting(without_checks=True)
        with torch.set_grad_enabled(not case.is_inference):
            outputs = parity.operator_of(operator)(inputs, attributes, SEED, request)
        found["forward"] = simulator.stop_counting()
        if not case.is_inference:
            results = differentiable(contract, outputs)
            generator = torch.Generator().manual_seed(SEED)
            dys = [torch.randn(y.shape, generator=generator).to(y) for y in results]
            simulator.start_counting(without_checks=True)
            torch.autograd.grad(results, leaves, dys, allow_unused=True)
            found["backward"] = simulator.stop_counting()
    finally:
        simulator.stop_counting()
        simulator.set_device("H100")
        _forget(signature)
    return found


def _forget(signature: Any) -> None:
    for chosen in signature.chosen:
        chosen.clear()


def row_of(
    operator: str, case: Case, dtype: str, direction: str, request: str, launches: list[Launch]
) -> dict[str, Any]:
    """What is kept of the launches of one direction."""
    at = DIRECTIONS.index(direction)
    work = roofline.work(operator, case, parity.PRECISIONS[dtype][0])
    rows = [row for launch in launches for row in pipes.instructions_of(launch)]
    kinds = dict.fromkeys(NAMES, 0)
    for row in rows:
        kinds[family_of(row.name)] += row.issued
    issued = sum(kinds.values())
    mma = kinds["mma"]
    own = not request.endswith(":composed")  # else the products are torch's
    return {
        "op": operator, "case": case.id, "dtype": dtype, "direction": direction,
        "request": request, "launches": len(launches), "issued": issued,
        "folded": sum(row.issued for row in rows if is_folded(row.name)),
        "lanes": round(sum(row.lanes for row in rows) / max(issued, 1), 2),
        "per_16_bytes": round(16 * issued / work.bytes[at], 3),
        "per_mma": round(issued / mma, 2) if mma else None,
        "mma": mma, "least_mma": round(own * work.flops[at] / pipes.FLOPS_OF_MMA),
        "asked_bytes": sum(row.bytes for row in rows if row.sectors),
        "sectors": sum(row.sectors for row in rows),
        "cache_bytes": sum(map(pipes.cache_bytes, launches)),
        "memory_bytes": sum(map(pipes.memory_bytes, launches)),
        "least_bytes": work.bytes[at],
        "wavefronts": sum(row.wavefronts for row in rows),
        "least_wavefronts": sum(row.least_wavefronts for row in rows),
        "kinds": {family: n for family, n in kinds.items() if n},
    }  # fmt: skip


def bounds_of(launches: list[Launch], gpu: str) -> dict[str, Any]:
    """The bound on a GPU, in microseconds, what it is by, and each pipe's time."""
    time, by, times = pipes.bound(launches, GPUS[gpu])
    return {
        "us": round(1e6 * time, 3), "by": by,
        "pipes": {pipe: round(1e6 * t, 3) for pipe, t in times.items()},
    }  # fmt: skip


def counted(
    operator: str, case: Case, dtype: str, request: str, gpus: Sequence[str],
    directions: Sequence[str] = DIRECTIONS,
) -> tuple[Rows, dict[str, dict[str, list[Launch]]]]:  # fmt: skip
    """A row for each direction, and the launches by GPU and direction. What does not depend on the
    GPU is told as it is on the last one.
    """
    by_gpu: dict[str, dict[str, list[Launch]]] = {}
    for gpu in dict.fromkeys(ALIKE.get(gpu, gpu) for gpu in gpus):
        by_gpu[gpu] = count(operator, case, dtype, request, gpu)
    last = ALIKE.get(gpus[-1], gpus[-1])
    rows: Rows = []
    for direction in directions:
        if direction not in by_gpu[last]:
            continue
        row = row_of(operator, case, dtype, direction, request, by_gpu[last][direction])
        row["bounds"] = {
            gpu: bounds_of(by_gpu[ALIKE.get(gpu, gpu)][direction], gpu) for gpu in gpus
        }
        rows.append(row | {"commit": commit()})
    return rows, by_gpu


def request_of(operator: str, case: Case, dtype: str) -> str:
    """The form that serves the case by kernels of this package alone, or else the first that serves
    it: of `composed` torch's own kernels are not counted.
    """
    requests = sorted(
        dispatch.every_request(operator, "cuda_sim"), key=lambda name: not name.endswith(":single")
    )
    return next((r for r in requests if not parity.why_refused(operator, r, case, dtype)), "")


def takes_too_long(operator: str, case: Case, dtype: str) -> bool:
    """By the estimate of what kernels issue."""
    return estimate(roofline.work(operator, case, parity.PRECISIONS[dtype][0])) > LONGEST


def estimate(work: roofline.Work) -> float:
    """Warp instructions, by what kernels issued so far: about 8 for 16 bytes and 10 for each
    product.
    """
    return sum(work.bytes) / 2 + 10 * sum(work.flops) / pipes.FLOPS_OF_MMA


def record() -> Rows:
    """What the tests hold the kernels to: each operator's small case."""
    return [row for operator in OPERATORS for row in recorded_of(operator)]


def recorded_of(operator: str) -> Rows:
    """The rows of one operator, as short as they are kept."""
    case = shapes.COUNTED[operator]
    request = request_of(operator, case, RECORDED_DTYPE)
    found, _ = counted(operator, case, RECORDED_DTYPE, request, [RECORDED_GPU])
    keys = ("op", "case", "dtype", "direction", "request", "issued", "per_16_bytes")
    return [{key: row[key] for key in keys} for row in found]


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 2 for a wrong request."""
    options = _parse(arguments)
    if options.record:
        write(RECORDED, record())
        return 0
    gpus = options.gpus.split(",")
    try:
        chosen, left_out = _chosen(options, gpus)
    except ValueError as error:
        print(f"benchmarks.counters: {error}", file=sys.stderr)
        return 2
    directions = [options.direction] if options.direction else list(DIRECTIONS)
    rows = read(options.json) if options.json and options.json.is_file() else []
    for case in chosen:
        request = options.request or request_of(options.op, case, options.dtype)
        refusal = parity.why_refused(options.op, request, case, options.dtype) if request else ""
        if refusal or not request:
            print(f"{options.op} {case.id} {options.dtype}: not by {request}: {refusal}")
            continue
        found, by_gpu = counted(options.op, case, options.dtype, request, gpus, directions)
        counters_report.show(found, by_gpu, gpus, is_short=not options.case)
        rows = [row for row in rows if _key(row) not in map(_key, found)] + found
        if options.json:
            write(options.json, rows)
    if left_out:
        print(f"left out, --case counts them: {', '.join(left_out)}")
    print(counters_report.WHAT)
    return 0


def _chosen(options: argparse.Namespace, gpus: Sequence[str]) -> tuple[list[Case], list[str]]:
    """The cases to count, and the names of the others. Raises ValueError for a wrong request."""
    known = {case.id: case for case in shapes.cases_of(options.op, "cuda")}
    for given, option, names in (
        ([options.case] if options.case else [], "--case", list(known)),
        (gpus, "--gpus", list(GPUS)),
        ([options.request] if options.request else [], "--request",
         dispatch.every_request(options.op, "cuda_sim")),
    ):  # fmt: skip
        for name in given:
            if name not in names:
                raise ValueError(f"{option}: expected one of {', '.join(names)}, got '{name}'")
    if options.case:
        return [known[options.case]], []
    chosen = [
        case
        for case in shapes.cases_of(options.op, "cpu")
        if case.is_quick and not takes_too_long(options.op, case, options.dtype)
    ]
    return chosen, [name for name in known if name not in {case.id for case in chosen}]


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("op", "case", "dtype", "direction", "request"))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--op", choices=list(OPERATORS), default="gated_adapter")
    parser.add_argument("--case", help="one of the benchmark shapes; default those that are quick")
    parser.add_argument("--dtype", choices=list(parity.PRECISIONS), default="bfloat16")
    parser.add_argument("--direction", choices=DIRECTIONS, help="default both")
    parser.add_argument("--request", help="a form of the backend cuda_sim")
    parser.add_argument("--gpus", default=",".join(GPUS), help="with commas; default all known")
    parser.add_argument(
        "--json", type=Path, help="file to which rows are added, or in which they are replaced"
    )
    parser.add_argument("--record", action="store_true", help="what the tests hold kernels to")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
