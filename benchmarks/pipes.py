"""The least time that what a launch did takes the pipes of a GPU.

Each pipe's time is its work over its rate, on the multiprocessor that gets the most blocks, all
blocks taken to be alike; the largest is the bound. It is what no schedule can be faster than as far
as the counts go: latency, and what PTX does not show (registers, the assembler's own instructions),
is not in it.
"""

from __future__ import annotations

from math import ceil
from typing import Any, NamedTuple

from .instructions import family_of, is_folded, pipe_of

PIPES = ("issue", "f32", "int", "special", "shared", "L2", "mma", "memory")
SECTOR = 32  # bytes
FLOPS_OF_MMA = 2 * 16 * 8 * 16
LATENCY = 600e-9  # seconds of a load from memory, about


class Gpu(NamedTuple):
    """Rates of one multiprocessor, for each cycle, and of the memory. Whatever is in doubt makes
    the bound lower: the clock is the highest.
    """

    multiprocessors: int
    clock: float  # cycles a second
    memory: float  # bytes a second
    f32: int  # lanes
    mma: float  # cycles of an m16n8k16 by mma.sync
    issue: int = 4  # warp instructions
    int_: int = 64  # lanes
    special: int = 16  # lanes
    shared: int = 1  # wavefronts of 128 bytes
    l2: int = 64  # bytes


# Memory as a copy was seen to move it on H100 and H200, and as A100's sheet says.
GPUS = {
    "A100": Gpu(108, 1.41e9, 2.0e12, 64, 2.0),
    "H100": Gpu(132, 1.98e9, 3.0e12, 128, 1.6),
    "H200": Gpu(132, 1.98e9, 4.3e12, 128, 1.6),
}
# GPUs on which kernels are launched alike: what is counted on one holds for the other.
ALIKE = {"H200": "H100"}

Launch = dict[str, Any]


class Counted(NamedTuple):
    """One PTX instruction of a launch, as the simulator gives it."""

    name: str
    source: str
    issued: int
    lanes: int
    bytes: int
    sectors: int
    wavefronts: int
    least_wavefronts: int


def instructions_of(launch: Launch) -> list[Counted]:
    """Those that were issued at all."""
    return [Counted(*row) for row in launch["instructions"]]


def blocks_of(launch: Launch) -> int:
    """How many blocks there are."""
    x, y, z = launch["blocks"]
    return int(x * y * z)


def memory_bytes(launch: Launch) -> int:
    """Each sector that the launch touches, read once and written once."""
    return SECTOR * int(launch["memory_sectors_read"] + launch["memory_sectors_written"])


def cache_bytes(launch: Launch) -> int:
    """Each sector that a block touches, read once and written once for each block."""
    return SECTOR * int(launch["cache_sectors_read"] + launch["cache_sectors_written"])


def cycles(launch: Launch, gpu: Gpu) -> dict[str, float]:
    """Of each pipe but memory, on one multiprocessor if it had all blocks."""
    found = instructions_of(launch)

    def issued(pipe: str) -> int:
        return sum(row.issued for row in found if pipe_of(row.name) == pipe)

    return {
        "issue": sum(row.issued for row in found if not is_folded(row.name)) / gpu.issue,
        "f32": 32 * issued("f32") / gpu.f32,
        "int": 32 * issued("int") / gpu.int_,
        "special": 32 * issued("special") / gpu.special,
        "shared": sum(row.wavefronts for row in found) / gpu.shared,
        "L2": cache_bytes(launch) / gpu.l2,
        "mma": sum(row.issued for row in found if family_of(row.name) == "mma") * gpu.mma,
    }


def seconds(launch: Launch, gpu: Gpu) -> dict[str, float]:
    """Of each pipe, with whole waves: the multiprocessor with the most blocks decides."""
    blocks = blocks_of(launch)
    share = ceil(blocks / gpu.multiprocessors) / blocks
    return {pipe: c * share / gpu.clock for pipe, c in cycles(launch, gpu).items()} | {
        "memory": memory_bytes(launch) / gpu.memory
    }


def bound(launches: list[Launch], gpu: Gpu) -> tuple[float, str, dict[str, float]]:
    """Of launches one after the other: the sum of what bounds each, the pipe that bounds the most
    of it, and each pipe's time.
    """
    total = dict.fromkeys(PIPES, 0.0)
    bounding = dict.fromkeys(PIPES, 0.0)
    for launch in launches:
        times = seconds(launch, gpu)
        largest = max(times, key=lambda pipe: times[pipe])
        bounding[largest] += times[largest]
        for pipe, time in times.items():
            total[pipe] += time
    return sum(bounding.values()), max(bounding, key=lambda pipe: bounding[pipe]), total


def occupancy(launch: Launch, gpu: Gpu) -> tuple[float, float, float]:
    """Warps for each scheduler; bytes under way where each warp waits for one load from global
    memory; how many such loads each warp has to have under way for the memory's rate.
    """
    blocks = blocks_of(launch)
    resident = min(launch["blocks_per_multiprocessor"], ceil(blocks / gpu.multiprocessors))
    warps = resident * launch["threads"] / 32
    loads = [
        row
        for row in instructions_of(launch)
        if row.sectors and family_of(row.name) in ("global loads", "cp.async")
    ]
    issued = sum(row.issued for row in loads)
    of_one = sum(row.bytes for row in loads) / issued if issued else 0.0
    under_way = warps * of_one * min(gpu.multiprocessors, blocks)
    return warps / 4, under_way, gpu.memory * LATENCY / under_way if under_way else 0.0
