"""Every arithmetic instruction of the simulator gives what PTX defines, on edges and random values,
in the lanes that run it, and leaves the others alone.
"""

from __future__ import annotations

import math
import random
import shutil
import struct
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from definitions import ANY, DEFINITIONS, bits_of_type, decoded, encoded
from definitions_of_floats import Near, define_floats
from definitions_of_integers import define_bits, define_integers
from ptx import LANES, kernel, run, simulator

pytestmark = pytest.mark.backend("cuda_sim")
define_integers()
define_bits()
define_floats()

ROUNDS = 8
# A destination holds these bits before the instruction; lanes that do not run it keep them.
BEFORE = 0xA5C3_96E1_5A3C_691F
COUNTS = (0, 1, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 2**31, 2**32 - 1)
FLOATS = (
    *(
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.5,
        -0.5,
        1.5,
        2.5,
        -2.5,
        3.0,
        127.5,
        -126.0,
        -127.25,
        -149.0,
        2.0**23,
    ),
    *(2.0**24 + 2, 2.0**31, -(2.0**31), 2.0**32, 2.0**63, -(2.0**63), 2.0**64, 65504.0, 65519.0),
    *(65520.0, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 2.0**-24, 2.0**-25),
    *(2.0**-126, -(2.0**-126), 2.0**-149, -(2.0**-149), 2.0**-127, 3.4028234663852886e38),
    *(-3.4028234663852886e38, math.inf, -math.inf, math.nan),
)


def draw(kind: str, source: random.Random) -> int:
    """The bits of an operand: often an edge."""
    if kind == "pred":
        return source.getrandbits(1)
    if kind == "count":
        return source.choice(COUNTS) if source.random() < 0.6 else source.randrange(40)
    width = bits_of_type(kind)
    if source.random() < 0.4:
        return source.getrandbits(width)
    if kind == "f32":
        # Some neighbours of the edges too, and some numbers of ordinary size.
        bits = struct.unpack("<I", struct.pack("<f", source.choice(FLOATS)))[0]
        return source.choice((bits, bits, bits ^ 1, encoded("f32", source.uniform(-99, 99), 32)))
    edges = (0, 1, 2, 3, 2 ** (width - 1), 2 ** (width - 1) - 1, 2**width - 1, 2**width - 2)
    return source.choice(edges)


def register_bits(name: str, kind: str, is_destination: bool) -> int:
    """Of the register in which an operand stands. Conversions extend their result to all of it."""
    if is_destination and name.startswith("cvt.") and kind in ("s8", "u8", "s16", "u16"):
        return 32
    return max(bits_of_type(kind), 16)


def register(kind: str, bits: int, number: int) -> str:
    return f"%{'p' if kind == 'pred' else {16: 'h', 32: 'r', 64: 'q'}[bits]}{number}"


def load(kind: str, bits: int, number: int, slot: int) -> str:
    address = f"[%q8+{slot * 8 * LANES}]"
    if kind != "pred":
        return f"ld.global.b{bits} {register(kind, bits, number)}, {address};"
    return f"ld.global.b32 %r{number}, {address};\nsetp.ne.b32 %p{number}, %r{number}, 0;"


def store(kind: str, bits: int, number: int, slot: int) -> str:
    address = f"[%q9+{slot * 8 * LANES}]"
    if kind != "pred":
        return f"st.global.b{bits} {address}, {register(kind, bits, number)};"
    return f"selp.b32 %r{number}, 1, 0, %p{number};\nst.global.b32 {address}, %r{number};"


class Trial:
    """One instruction on 32 lanes: its operands, and where they and its results stand in memory."""

    def __init__(self, name: str, number: int, slot: int, result: int) -> None:
        self.name, self.definition = name, DEFINITIONS[name]
        self.slot, self.result = slot, result  # the first slots of 32 x 8 bytes
        source = random.Random(f"{name} {number}")
        self.lanes = (1 << LANES) - 1 if number % 2 == 0 else source.getrandbits(LANES)
        self.table = source.getrandbits(8)  # of lop3, which is part of the instruction
        self.values = [
            [self.table if kind == "table" else draw(kind, source) for _ in range(LANES)]
            for kind in self.definition.sources
        ]

    def text(self) -> str:
        """Loads the operands, fills the destinations, runs the instruction and stores them."""
        lines, destinations, sources = [load("pred", 32, 9, self.slot)], [], []
        for n, kind in enumerate(self.definition.destinations, 10):
            bits = register_bits(self.name, kind, True)
            lines.append(load(kind, bits, n, 0))
            destinations.append(register(kind, bits, n))
        for n, kind in enumerate(self.definition.sources, 1):
            if kind == "table":
                sources.append(str(self.table))
                continue
            bits = register_bits(self.name, kind, False)
            lines.append(load(kind, bits, n, self.slot + n))
            sources.append(register(kind, bits, n))
        word, _, form = self.name.partition(" ")
        to, of = ", ".join(destinations), ", ".join(sources)
        to, of = (
            "{" + to + "}" if form == "unpack" else to,
            "{" + of + "}" if form == "pack" else of,
        )
        lines.append(f"{'@%p9 ' if self.lanes + 1 != 1 << LANES else ''}{word} {to}, {of};")
        for n, kind in enumerate(self.definition.destinations):
            bits = register_bits(self.name, kind, True)
            lines.append(store(kind, bits, 10 + n, self.result + n))
        return "\n".join(lines)

    def write(self, memory: np.ndarray) -> None:
        memory[self.slot] = [self.lanes >> lane & 1 for lane in range(LANES)]
        for n, values in enumerate(self.values, 1):
            memory[self.slot + n] = values

    def faults(self, results: np.ndarray) -> list[str]:
        return [fault for lane in range(LANES) for fault in self.faults_of(lane, results)]

    def faults_of(self, lane: int, results: np.ndarray) -> list[str]:
        kinds = self.definition.sources
        operands = [decoded(k, values[lane]) for k, values in zip(kinds, self.values)]
        expected = self.definition.compute(*operands)
        if len(self.definition.destinations) == 1:
            expected = (expected,)
        faults = []
        for n, kind in enumerate(self.definition.destinations):
            width = 1 if kind == "pred" else register_bits(self.name, kind, True)
            found = int(results[self.result + n][lane]) & ((1 << width) - 1)
            if not self.lanes >> lane & 1:
                is_right = found == (1 if kind == "pred" else BEFORE & ((1 << width) - 1))
            else:
                is_right = agrees(kind, found, expected[n], width)
            if not is_right:
                hexadecimal = [hex(values[lane]) for values in self.values]
                faults.append(
                    f"{self.name} {operands} {hexadecimal}: {found:#x}, not {expected[n]}"
                )
        return faults


def agrees(kind: str, found: int, expected: Any, width: int) -> bool:
    if expected is ANY:
        return True
    if isinstance(expected, Near):
        return expected.holds(decoded(kind, found))
    if isinstance(expected, float) and math.isnan(expected):
        return math.isnan(decoded(kind, found))
    return found == encoded(kind, expected, width)


def trials_of(names: list[str], rounds: int) -> tuple[list[Trial], int, int]:
    """With the slots of memory that their operands and results take; slot 0 is BEFORE."""
    trials, slot, result = [], 1, 0
    for name in names:
        for number in range(rounds):
            trials.append(Trial(name, number, slot, result))
            slot += 1 + len(DEFINITIONS[name].sources)
            result += len(DEFINITIONS[name].destinations)
    return trials, slot, result


def text_of(trials: list[Trial]) -> str:
    addresses = "mul.wide.u32 %q10, %r0, 8;\nadd.s64 %q8, %q0, %q10;\nadd.s64 %q9, %q1, %q10;\n"
    return kernel(addresses + "\n".join(trial.text() for trial in trials))


@cache
def outcome() -> dict[str, list[str]]:
    """The faults of each instruction, all run by one kernel."""
    names = [name for name in sorted(DEFINITIONS) if name in simulator().instructions()]
    trials, slots, results = trials_of(names, ROUNDS)
    operands = np.zeros((slots, LANES), np.uint64)
    operands[0] = BEFORE
    for trial in trials:
        trial.write(operands)
    found = np.zeros((results, LANES), np.uint64)
    run(text_of(trials), [operands, found])
    faults: dict[str, list[str]] = {name: [] for name in names}
    for trial in trials:
        faults[trial.name] += trial.faults(found)
    return faults


def test_every_instruction_is_defined_here() -> None:
    assert sorted(DEFINITIONS) == sorted(simulator().instructions())


@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_instruction(name: str) -> None:
    faults = outcome()[name]
    assert not faults, "\n".join(faults[:8])


@pytest.mark.skipif(shutil.which("ptxas") is None, reason="no ptxas on PATH")
def test_assembler_takes_every_instruction(tmp_path: Path) -> None:
    """The names are those of PTX, with operands of the types that the definitions have."""
    trials, _, _ = trials_of(sorted(DEFINITIONS), 1)
    (tmp_path / "test.ptx").write_text(text_of(trials))
    command = ["ptxas", "-arch=sm_90", "-O1", "test.ptx", "-o", "test.cubin"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr + found.stdout
