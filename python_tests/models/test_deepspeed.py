"""DeepSpeed's configuration given to transformers' Trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")

STEPS = Path(__file__).with_name("deepspeed_steps.py")
# accelerate takes DeepSpeed on a CPU only where the environment asks for it, with one process's
# rank; DeepSpeed compiles its own communication.
ASKED = {
    "ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0",
    "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577",
}  # fmt: skip


def steps(kind: str, folder: Path, *zero: str):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (ASKED if zero else {})
    command = [sys.executable, str(STEPS), kind, str(folder), *zero]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["peft", "pelt"])
def test_steps_under_zero_are_those_without(kind: str, tmp_path: Path) -> None:
    found, plain = steps(kind, tmp_path / "zero", "zero"), steps(kind, tmp_path / "plain")
    assert found["deepspeed"] and not plain["deepspeed"]
    assert found["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert len(set(found["losses"])) == 3
    names = {path.name for path in (tmp_path / "zero").iterdir()}
    assert names == {path.name for path in (tmp_path / "plain").iterdir()}
