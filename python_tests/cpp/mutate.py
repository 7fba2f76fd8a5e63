"""Plants a fault in the PTX of a shipped kernel: an edit of the instructions that come from one
line of its source.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cases import Case
from ptx import simulator

CSRC = Path(__file__).parents[2] / "csrc"
Line = tuple[str, int]  # of a file under csrc

# What the simulator or the parity test say. Who comes first decides as which of three a race shows.
COPY = "asynchronous copy, for which its thread has not waited"
RACE = f"race: |reads memory that nobody has written|{COPY}"
OUTSIDE = "touches memory that the kernel was not given"
WRONG = ": error .*, allowed |NaN"
NOTHING = ""  # the fault changes nothing, for the reason in the table
BARRIER = r"^bar\.sync 0;$"
WARP_BARRIER = r"^bar\.warp\.sync.*"
WAIT = r"^cp\.async\.wait_group 0;$"


@dataclass(frozen=True)
class Mutant:
    """`place` is "file: words": the line of code that has the words, or that stands under a comment
    which has them. "file: words -> call" is the first line from there on that has the call, and an
    empty place every line. All of that line's instructions that match are changed.
    """

    id: str
    kernel: str  # as the simulator calls it
    place: str
    instruction: str  # a regular expression
    replacement: str
    case: Case
    caught: str  # a regular expression for the fault's text
    precision: str = "float32"
    seeds: tuple[int, ...] = (1, 2, 3)

    @property
    def operator(self) -> str:
        """The first word of the mutant's name."""
        return self.id.split(" ")[0]


@cache
def line_of(place: str) -> Line:
    """The line that a place names."""
    file, words = place.split(": ", 1)
    words, _, call = words.partition(" -> ")
    lines = (CSRC / file).read_text().splitlines()
    found = [n for n, line in enumerate(lines) if words in line]
    assert len(found) == 1, f"{place}: {len(found)} lines have these words"
    number = found[0]
    while lines[number].lstrip().startswith("//") or call not in lines[number]:
        number += 1
    return file, number + 1


def files_of(ptx: str) -> dict[str, str]:
    """The module's files by their numbers."""
    found = re.findall(r'^\.file\s+(\d+)\s+"([^"]*)"', ptx, re.MULTILINE)
    return {number: path.rpartition("csrc/")[2] for number, path in found}


def with_sources(kernel: str, files: dict[str, str]) -> Iterator[tuple[str, tuple[Line, ...]]]:
    """Each line of a kernel's PTX with the lines it comes from: its own and those where functions
    were inlined, which the compiler names by line and column.
    """
    chains: dict[tuple[str, str, str], tuple[Line, ...]] = {}
    now: tuple[Line, ...] = ()
    for line in kernel.splitlines():
        numbers = re.findall(r"(?:^\.loc|inlined_at)\s+(\d+) (\d+) (\d+)", line)
        if not numbers or numbers[0][1] == "0":
            yield line, now
            continue
        own, *outer = numbers
        now = ((files.get(own[0], ""), int(own[1])),)
        if outer:
            now += chains.get(outer[0], ((files.get(outer[0][0], ""), int(outer[0][1])),))
        chains[own] = now
        yield line, now


def mutated(mutant: Mutant) -> str:
    """A module with the changed kernel alone."""
    ptx, entry = simulator().ptx_of(mutant.kernel)
    head = ptx[: ptx.rindex("\n", 0, ptx.index(".entry ")) + 1]
    begin = ptx.rindex("\n", 0, ptx.index(f".entry {entry}")) + 1
    end = ptx.index("\n}\n", begin) + 3
    place = line_of(mutant.place) if mutant.place else None
    lines, count = [], 0
    for line, sources in with_sources(ptx[begin:end], files_of(ptx)):
        if place is None or place in sources:
            line, changes = re.subn(mutant.instruction, mutant.replacement, line)
            count += changes
        lines.append(line)
    assert count > 0, f"{mutant.id}: no instruction is changed"
    return head + "\n".join(lines) + ptx[ptx.index("\n.file\t") :]


@contextmanager
def planted(mutant: Mutant) -> Iterator[None]:
    """The kernel runs with the fault until the end of the block."""
    simulator().replace_ptx(mutant.kernel, mutated(mutant))
    try:
        yield
    finally:
        simulator().replace_ptx(mutant.kernel, "")
