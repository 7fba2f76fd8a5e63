"""`benchmarks/gpu_check.sh`: the order of its stages, what a failure and a lack of time do, and that a
second run goes on where the first ended. The stages that run here are made up.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from benchmarks import gpu_check, gpu_stages
from benchmarks.checkout import ROOT, commit
from benchmarks.gpu_stages import Stage
from pelt_kernels.ops import OPERATORS

FIRST = ["machine", "build", "parity", "memcheck", "racecheck", "synccheck", "initcheck"]


def shell(name, command, most=600.0, least=0.0, **more):
    return Stage(name, ("sh", "-c", command), most, least, **more)


@pytest.fixture
def check(tmp_path):
    """check(stages, seconds, more...): the command's end and, of each stage, state and note."""

    def check(*stages, seconds=3600.0, more=()):
        code = gpu_check.main([str(tmp_path), "--seconds", str(seconds), *more], stages)
        rows = json.loads((tmp_path / "state.json").read_text())["stages"]
        return code, {name: (state, note) for name, (state, note, _) in rows.items()}

    return check


class Clock:
    """Time that begins when all of the files are there, so that no test depends on how soon a busy
    machine begins a stage.
    """

    def __init__(self, *files):
        self.now, self.files = 0.0, files

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        time.sleep(0.02)
        if all(file.exists() for file in self.files):
            self.now += 0.2


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """clock(name, ...): the time of the check begins when stages have made these files."""

    def clock(*names):
        clock = Clock(*(tmp_path / name for name in names))
        monkeypatch.setattr(gpu_check, "time", clock)
        return clock

    return clock


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_plan_is_in_the_order_of_value(device, tmp_path):
    stages = gpu_stages.plan(device, tmp_path, jobs=16)
    names = [stage.name for stage in stages]
    assert names[: len(FIRST)] == FIRST and len(set(names)) == len(names)
    assert set(OPERATORS) == set(gpu_stages.OPERATORS)
    order = ["roofline", *gpu_stages.OPERATORS, "forms", "torch.compile", "steps", "host"]
    assert names[len(FIRST) : len(FIRST) + len(order)] == order
    assert [stage.name for stage in stages if stage.is_needed] == ["machine", "build"]
    together = {stage.group for stage in stages[2 : len(FIRST)]}
    assert len(together) == 1 and together != {""}


def test_sanitizers_watch_own_kernels_without_the_allocator_and_go_on_after_a_failure(tmp_path):
    stages = {stage.name: stage for stage in gpu_stages.plan("cuda", tmp_path, jobs=16)}
    for tool in gpu_stages.SANITIZERS:
        stage = stages[tool]
        assert stage.command[:3] == ("compute-sanitizer", "--tool", tool)
        assert stage.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        assert "-x" not in stage.command
        # initcheck has to see that torch's kernels write what ours read.
        assert ("--kernel-name" in stage.command) == (tool != "initcheck")
    assert "--without-poison" in stages["initcheck"].command


def test_the_script_cuts_everything_without_time(tmp_path, monkeypatch):
    """The real plan, as far as it goes in no time at all."""
    monkeypatch.setenv("PELT_COMMIT", "c")
    environment = {**os.environ, "DEVICE": "cpu", "PYTHON": sys.executable}
    command = [ROOT / "benchmarks" / "gpu_check.sh", tmp_path / "out", "--seconds", "1"]
    done = subprocess.run(command, text=True, capture_output=True, env=environment, check=False)
    assert done.returncode == 3, done.stderr
    planned = [stage.name for stage in gpu_stages.plan("cpu", tmp_path, jobs=2)]
    summary = (tmp_path / "out" / "summary.txt").read_text()
    *rows, last = summary.splitlines()
    assert [row.split()[0] for row in rows] == planned
    assert all(row.split()[1].startswith("cut") for row in rows)
    assert f"commit {commit()}: 0 passed, 0 failed, {len(planned)} cut" == last
    assert done.stdout.endswith(summary)


def test_a_failure_stops_nothing_and_stays_in_the_code(check, capsys):
    code, stages = check(
        shell("a", "echo good"), shell("b", "echo bad; exit 7"), shell("c", "echo fine")
    )
    assert code == 1
    assert stages == {"a": ("ok", ""), "b": ("failed", "ended with 7"), "c": ("ok", "")}
    assert "2 passed, 1 failed, 0 cut" in capsys.readouterr().out


def test_what_others_need_stops_them_when_it_fails(check):
    code, stages = check(shell("build", "exit 1", is_needed=True), shell("tests", "true"))
    assert code == 1
    assert stages["tests"] == ("cut", "not begun, because build did not pass")


def test_a_stage_at_its_limit_is_cut_and_its_report_kept(check, clock, tmp_path):
    clock("begun")
    begun = tmp_path / "begun"
    slow = f"trap 'echo report; exit 2' INT; echo begun; touch {begun}; sleep 20 & wait"
    code, stages = check(shell("slow", slow, most=5), shell("after", "true"))
    assert code == 3
    assert stages == {"slow": ("cut", "at its limit of 5 s"), "after": ("ok", "")}
    log = (tmp_path / "log.txt").read_text()
    assert log.count("begun\nreport\n") == 1 and "==== slow: cut" in log


def test_a_failure_found_before_the_limit_is_one(check, clock, tmp_path):
    clock("begun")
    command = f"echo 'FAILED a.py::b'; touch {tmp_path / 'begun'}; sleep 20"
    slow = shell("tests", command, most=5, sign_of_failure=gpu_stages.FAILED_TESTS)
    assert check(slow) == (1, {"tests": ("failed", "'FAILED a.py::b' in its log")})


def test_a_report_of_errors_is_a_failure_whatever_the_end(check):
    said = "========= ERROR SUMMARY: 3 errors"
    code, stages = check(
        shell("found", f"echo '{said}'", sign_of_failure=gpu_stages.SANITIZED),
        shell("clean", "echo '========= ERROR SUMMARY: 0 errors'",
              sign_of_failure=gpu_stages.SANITIZED),
    )  # fmt: skip
    assert code == 1
    assert stages == {"found": ("failed", f"'{said}' in its log"), "clean": ("ok", "")}


def test_no_stage_outlives_the_time_for_everything(check, clock, tmp_path):
    clock("begun")
    long = shell("long", f"touch {tmp_path / 'begun'}; sleep 20", most=1e6)
    seconds = 15 + gpu_check.GRACE + gpu_check.RESERVE
    code, stages = check(long, shell("late", "true", least=20), seconds=seconds)
    assert code == 3
    assert stages["long"] == ("cut", "at its limit of 15 s")
    assert stages["late"][0] == "cut" and "were left of the 20 it needs" in stages["late"][1]


def test_stages_of_a_group_run_side_by_side(check, tmp_path):
    meet = "touch {0}; while [ ! -e {1} ]; do sleep 0.05; done"
    one, two = tmp_path / "one", tmp_path / "two"
    code, _ = check(
        shell("a", meet.format(one, two), group="both"),
        shell("b", meet.format(two, one), group="both"),
    )
    assert code == 0


def test_a_second_run_goes_on(check, tmp_path):
    ran = tmp_path / "ran"
    passed, cut = (
        shell("passed", f"echo passed >> {ran}"),
        shell("cut", f"echo cut >> {ran}", least=1e6),
    )
    failed = shell("failed", f"echo failed >> {ran}; exit 1")
    assert check(passed, failed, cut)[0] == 1
    assert ran.read_text().split() == ["passed", "failed"]
    # Now there is time: what was cut comes before what failed, which passes this time.
    cut, failed = shell("cut", f"echo cut >> {ran}"), shell("failed", f"echo again >> {ran}")
    code, stages = check(passed, failed, cut)
    assert code == 0 and {state for state, _ in stages.values()} == {"ok"}
    assert ran.read_text().split() == ["passed", "failed", "cut", "again"]


def test_what_failed_and_is_not_reached_again_stays_failed(check):
    assert check(shell("bad", "exit 1"))[0] == 1
    code, stages = check(shell("bad", "true", least=1e6))
    assert code == 1 and stages["bad"][0] == "failed"


def test_what_failed_and_is_cut_now_stays_failed(check, clock, tmp_path):
    assert check(shell("bad", "exit 1"))[0] == 1
    clock("begun")
    code, stages = check(shell("bad", f"touch {tmp_path / 'begun'}; sleep 20", most=5))
    assert code == 1 and stages["bad"] == ("failed", "before; now at its limit of 5 s")


def test_a_command_that_is_not_there_fails_and_stops_nothing(check, tmp_path):
    code, stages = check(Stage("tool", ("no-such-tool", "-x"), 600, 0), shell("after", "true"))
    assert code == 1
    assert stages == {"tool": ("failed", "ended with 127"), "after": ("ok", "")}
    assert "no-such-tool: not found" in (tmp_path / "log.txt").read_text()


def test_a_whole_group_is_interrupted_at_once(check, clock, tmp_path):
    names = ("a", "b", "c", "d")
    now = clock(*names)
    stubborn = "trap '' INT; touch {}; while :; do sleep 0.1; done"
    code, stages = check(
        *(shell(n, stubborn.format(tmp_path / n), most=5, group="all") for n in names)
    )
    assert code == 3 and {state for state, _ in stages.values()} == {"cut"}
    assert 5 + gpu_check.GRACE < now.now < 5 + 2 * gpu_check.GRACE


def test_a_stage_without_its_files_is_not_done(check, tmp_path):
    ran = tmp_path / "ran"
    build = shell("build", f"echo built >> {ran}", makes="pelt_kernels/no_such_module*")
    assert check(build)[0] == 0 and check(build)[0] == 0
    assert ran.read_text().split() == ["built", "built"]


def test_results_of_other_sources_are_not_mixed_in(check, monkeypatch, capsys, tmp_path):
    check(shell("a", "true"))
    monkeypatch.setattr(gpu_check, "_fingerprint", lambda: "other")
    assert gpu_check.main([str(tmp_path)], [shell("a", "true")]) == 2
    assert "holds results of other sources" in capsys.readouterr().err


def test_stages_by_name(check, capsys, tmp_path):
    code, stages = check(shell("a", "true"), shell("b", "true"), more=("--stages", "b"))
    assert code == 3 and stages == {"b": ("ok", "")}
    assert gpu_check.main([str(tmp_path), "--stages", "x"], [shell("a", "true")]) == 2
    assert "--stages: expected some of a, got 'x'" in capsys.readouterr().err


def test_a_commit_from_the_environment_where_git_has_none(monkeypatch):
    monkeypatch.setenv("PELT_COMMIT", "abc")
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert commit() == "abc"
    monkeypatch.setenv("PATH", "/nowhere")
    assert commit() == "abc"
    monkeypatch.delenv("PELT_COMMIT")
    assert commit() == "unknown"
