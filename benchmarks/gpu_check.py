"""Runs everything that only a GPU can tell, stage after stage, until the time is over.

    benchmarks/gpu_check.sh [FOLDER] [--seconds 540] [--stages NAME,NAME] [--device cpu]

The stages (benchmarks/gpu_stages.py) stand in the order of their value. What fails does not stop
the next one, but for what all others need; what there is no time for is named as cut. After each
stage FOLDER holds the rows that were measured, all logs in log.txt, and summary.txt. Run again with
the same FOLDER, it goes on: stages that passed are skipped, then those are run that were cut, and
last those that failed; what failed and is not reached again stays failed.

Ends with 0 if all stages passed, 1 if one failed, 3 if none failed and some were cut, 2 for a wrong
request. Needs python3 with torch, transformers, pybind11, cmake, ninja, pytest and matplotlib, nvcc
and compute-sanitizer, and no network; triton and pytest-xdist are used where they are. PELT_COMMIT
names the commit where there is no repository.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from .checkout import ROOT, commit
from .gpu_stages import Stage, plan

SECONDS = 540.0
RESERVE = 5.0  # for writing, out of what there is in all
GRACE = 10.0  # from the interrupt, on which reports are printed, to the end by force
OK, FAILED, CUT = "ok", "failed", "cut"
TAIL = 12  # lines of each log that are shown


class Result(NamedTuple):
    """How a stage ended."""

    state: str
    note: str = ""
    seconds: float = 0.0


class Check:
    """What is done and how much time there is."""

    def __init__(self, stages: Sequence[Stage], folder: Path, seconds: float) -> None:
        self.stages, self.folder = stages, folder
        self.end = time.monotonic() + seconds - RESERVE
        self.results: dict[str, Result] = {}
        self.sources, self.commit = _fingerprint(), commit()
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        state = folder / "state.json"
        if state.is_file():
            earlier = json.loads(state.read_text())
            if earlier["sources"] != self.sources:
                raise ValueError(f"{folder} holds results of other sources; name another folder")
            self.results = {name: Result(*row) for name, row in earlier["stages"].items()}

    def run(self, names: Sequence[str]) -> None:
        """Runs what is not done of these stages."""
        chosen = [s for s in self.stages if s.name in names and not self._is_done(s)]
        # What others need comes first in any case, and what failed before last.
        chosen.sort(key=lambda s: not s.is_needed and self._state(s) == FAILED)
        groups: list[list[Stage]] = []
        for stage in chosen:
            if groups and stage.group and groups[-1][0].group == stage.group:
                groups[-1].append(stage)
            else:
                groups.append([stage])
        broken = ""
        for group in groups:
            if broken:
                self._put_off(group, f"not begun, because {broken} did not pass")
            elif self._left() < (least := max(stage.least for stage in group)):
                left = max(0, round(self._left()))
                self._put_off(group, f"not begun, {left} s were left of the {least} it needs")
            else:
                self._run(group)
            broken = broken or next(
                (s.name for s in group if s.is_needed and self._state(s) != OK), ""
            )

    def _left(self) -> float:
        return self.end - time.monotonic()

    def _state(self, stage: Stage) -> str:
        return self.results.get(stage.name, Result("")).state

    def _is_done(self, stage: Stage) -> bool:
        makes = not stage.makes or any(ROOT.glob(stage.makes))
        return self._state(stage) == OK and makes

    def _put_off(self, group: Sequence[Stage], note: str) -> None:
        for stage in group:
            self._set(stage, Result(CUT, note))
            print(f"== {stage.name}: {note}", flush=True)
        self.write()

    def _run(self, group: Sequence[Stage]) -> None:
        """Side by side, each to its limit or to the end of all time. At its limit a stage is
        interrupted, on which tests and benchmarks print what they have, and then killed.
        """
        started = time.monotonic()
        ends = {s.name: min(started + s.most, self.end - GRACE) for s in group}
        processes: dict[str, subprocess.Popen[bytes]] = {}
        interrupted: dict[str, float] = {}  # stage -> when
        waiting = list(group)
        try:
            for stage in group:
                processes[stage.name] = self._begin(stage)
            while waiting:
                time.sleep(0.05)
                now = time.monotonic()
                for stage in list(waiting):
                    process, end = processes[stage.name], ends[stage.name]
                    if process.poll() is not None:
                        waiting.remove(stage)
                        limit = end - started if stage.name in interrupted else None
                        self._finish(stage, process.returncode, now - started, limit)
                    elif stage.name in interrupted:
                        if now > interrupted[stage.name] + GRACE:
                            _signal(process, signal.SIGKILL)
                    elif now > end:
                        interrupted[stage.name] = now
                        _signal(process, signal.SIGINT)
        except KeyboardInterrupt:
            for stage in waiting:
                self._set(stage, Result(CUT, "interrupted", time.monotonic() - started))
            raise
        finally:
            for process in processes.values():  # and what a stage has left running
                _signal(process, signal.SIGKILL)

    def _begin(self, stage: Stage) -> subprocess.Popen[bytes]:
        """A command that cannot be begun is one that fails, with the reason in its log."""
        why = "" if shutil.which(stage.command[0]) else f"{stage.command[0]}: not found"
        command = ("sh", "-c", 'echo "$0"; exit 127', why) if why else stage.command
        with self._log(stage).open("wb") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**os.environ, **stage.environment},
                preexec_fn=os.setpgrp,  # a signal reaches the children too
            )

    def _set(self, stage: Stage, result: Result) -> None:
        """What failed in an earlier run and is cut now stays failed."""
        if result.state == CUT and self._state(stage) == FAILED:
            result = Result(FAILED, f"before; now {result.note}", result.seconds)
        self.results[stage.name] = result

    def _log(self, stage: Stage) -> Path:
        return self.folder / "logs" / f"{stage.name}.log"

    def _finish(self, stage: Stage, code: int, seconds: float, limit: float | None) -> None:
        """``limit`` is where the stage was cut, or None."""
        text = self._log(stage).read_text(errors="replace")
        sign = re.search(stage.sign_of_failure, text, re.M) if stage.sign_of_failure else None
        if sign:
            result = Result(FAILED, f"'{sign[0].strip()}' in its log", seconds)
        elif limit is not None:
            result = Result(CUT, f"at its limit of {limit:.0f} s", seconds)
        elif code:
            result = Result(FAILED, f"ended with {code}", seconds)
        else:
            result = Result(OK, "", seconds)
        self._set(stage, result)
        result = self.results[stage.name]
        print(f"== {stage.name}: {_told(result)}")
        print("\n".join(text.splitlines()[-TAIL:]), flush=True)
        with (self.folder / "log.txt").open("a") as log:
            log.write(f"==== {stage.name}: {_told(result)}\n$ {' '.join(stage.command)}\n{text}\n")
        self.write()

    def write(self) -> None:
        """The state, for the next run, and the summary, for people."""
        state = {"sources": self.sources, "stages": {n: list(r) for n, r in self.results.items()}}
        texts = {"state.json": json.dumps(state), "summary.txt": self.summary()}
        for name, text in texts.items():
            part = self.folder / f"{name}.part"
            part.write_text(text)
            part.replace(self.folder / name)

    def summary(self) -> str:
        """A line for each stage of the plan, in its order."""
        rows = [
            f"{stage.name:26} {_told(self.results.get(stage.name, Result(CUT, 'not begun')))}"
            for stage in self.stages
        ]
        states = [self._state(stage) for stage in self.stages]
        passed, failed = states.count(OK), states.count(FAILED)
        rest = len(states) - passed - failed
        rows.append(f"commit {self.commit}: {passed} passed, {failed} failed, {rest} cut")
        return "\n".join(rows) + "\n"

    def code(self) -> int:
        """What the command ends with."""
        states = {self._state(stage) for stage in self.stages}
        if FAILED in states:
            return 1
        return 0 if states <= {OK} else 3


def _told(result: Result) -> str:
    took = f", {result.seconds:.0f} s" if result.seconds else ""
    return f"{result.state}{took}{': ' * bool(result.note)}{result.note}"


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """To the process and its children, if there are any still."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _fingerprint() -> str:
    """Of all that is built and run, so that what passed is known to have been the same."""
    paths = [ROOT / "setup.py", ROOT / "CMakeLists.txt"]
    for folder in ("cmake", "csrc", "pelt_kernels"):
        paths += (ROOT / folder).rglob("*.*")
    found = hashlib.sha256()
    for path in sorted(paths):
        if path.suffix in (".py", ".txt", ".cmake", ".h", ".cuh", ".cu", ".cpp"):
            found.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def main(arguments: Sequence[str] | None = None, stages: Sequence[Stage] | None = None) -> int:
    """``stages`` instead of the plan's."""
    options = _parse(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = options.folder.resolve()
    os.environ["PELT_COMMIT"] = commit()
    stages = plan(options.device, folder, options.jobs) if stages is None else stages
    names = [stage.name for stage in stages]
    chosen = options.stages.split(",") if options.stages else names
    try:
        if unknown := [name for name in chosen if name not in names]:
            raise ValueError(f"--stages: expected some of {', '.join(names)}, got '{unknown[0]}'")
        check = Check(stages, folder, options.seconds)
    except ValueError as error:
        print(f"benchmarks.gpu_check: {error}", file=sys.stderr)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell left them to be ignored
        signal.signal(number, _interrupt)
    try:
        check.run(chosen)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    check.write()
    print(f"== summary after {time.monotonic() - check.end + options.seconds - RESERVE:.0f} s")
    print(check.summary(), end="")
    return check.code()


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/gpu_check"))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="workers of the tests")
    parser.add_argument("--stages", help="these only, with commas")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
