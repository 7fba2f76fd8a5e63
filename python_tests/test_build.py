"""What a build decides by itself: whether, and for which GPUs, it holds CUDA kernels."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CMAKE = Path(sys.executable).with_name("cmake")
# nvcc --list-gpu-arch, of CUDA 13.0
KNOWN = ["75", "80", "86", "87", "88", "89", "90", "100", "103", "110", "120", "121"]


def _program(folder: Path, name: str, script: str) -> None:
    program = folder / name
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def _told(folder: Path, asked: str = "auto", *more: str) -> tuple[str, str]:
    """What the build decides, and what it says."""
    command = [CMAKE, f"-DPELT_KERNELS_CUDA={asked}", *more, "-P", ROOT / "cmake" / "gpus.cmake"]
    environment = {"PATH": f"{folder}:/usr/bin:/bin"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    *said, archs = done.stderr.strip().splitlines()
    return archs.strip("'"), " ".join(said)


@pytest.mark.parametrize(
    ("nvidia_smi", "archs", "said"),
    [
        ("echo 8.0", "80", "CUDA kernels for 80"),
        ("echo 9.0; echo 8.6; echo 9.0", "90;86", "CUDA kernels for 90;86"),
        ("echo 7.5; echo 8.9", "89", "CUDA kernels for 89"),
        ("echo 13.0", "80", "nvcc does not know sm_130, which gets PTX only"),
        ("echo 7.5; echo 6.1", "", "need compute capability 8.0, and this machine's GPUs have 7.5, 6.1"),
        ("echo No devices were found; exit 6", "", "(6: No devices were found)"),
        ("echo couldn\\'t communicate with the NVIDIA driver >&2; exit 9", "", "the NVIDIA driver)"),
        ("exit 0", "", "nvidia-smi tells no compute capability (0: )"),
        ("", "", "no CUDA kernels: nvidia-smi is not there (PELT_KERNELS_CUDA=1 builds them)"),
    ],
)  # fmt: skip
def test_the_machines_gpus_decide_and_none_is_an_error(nvidia_smi, archs, said, tmp_path):
    nvcc = tmp_path / "nvcc"
    _program(tmp_path, "nvcc", "".join(f"echo compute_{number};" for number in KNOWN))
    if nvidia_smi:
        _program(tmp_path, "nvidia-smi", nvidia_smi)
    found, told = _told(tmp_path, "auto", f"-DNVCC={nvcc}")
    assert found == archs and said in told


def test_without_nvcc_there_are_no_cuda_kernels(tmp_path):
    _program(tmp_path, "nvidia-smi", "echo 9.0")
    assert _told(tmp_path) == (
        "",
        "pelt_kernels: no CUDA kernels: nvcc is not there (PELT_KERNELS_CUDA=1 builds them)",
    )
    assert _told(tmp_path, "off") == ("", "")


def test_a_release_holds_what_its_nvcc_knows(tmp_path):
    (release,) = re.findall(
        r'PELT_KERNELS_CUDA_ARCHS "([^"]+)" CACHE', (ROOT / "CMakeLists.txt").read_text()
    )
    assert release == "80;90;100;120"
    for newest, archs in ((120, release), (90, "80;90")):
        known = "".join(f"echo compute_{number};" for number in KNOWN if int(number) <= newest)
        _program(tmp_path, "nvcc", known)
        options = (f"-DNVCC={tmp_path}/nvcc", f"-DPELT_KERNELS_CUDA_ARCHS={release}")
        assert _told(tmp_path, "on", *options)[0] == archs


def test_cmake_is_asked_for_in_one_version():
    (wanted,) = re.findall(r"cmake>=([\d.]+)", (ROOT / "pyproject.toml").read_text())
    for name in ("CMakeLists.txt", "cmake/gpus.cmake"):
        found = re.findall(r"cmake_minimum_required\(VERSION ([\d.]+)\)", (ROOT / name).read_text())
        assert found == [wanted]
