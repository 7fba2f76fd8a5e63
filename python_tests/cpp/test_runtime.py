"""The simulator's CUDA runtime: what it takes from fat binaries, what it hands to the executor, and what
it refuses as a driver does, with the numbers.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
PARTS = ("runtime", "limits", "module", "device", "counters")
SOURCES = [CSRC / "sim" / f"{name}.cpp" for name in PARTS]
TO_PTX = ("-gencode", "arch=compute_80,code=compute_80", "--no-compress")


@pytest.fixture(scope="module")
def build(nvcc: Path, compiled: Callable[..., Path]) -> Callable[..., Callable[..., str]]:
    """build(name, *flags)(case): what runtime_test.cu prints, compiled with these flags."""
    command = (nvcc, "-std=c++17", "--cudart=none", f"-I{CSRC}")
    runtime = compiled("runtime.a", *command, "--lib", *SOURCES)

    def build(name: str, *flags: str) -> Callable[..., str]:
        made_of = (HERE / "runtime_test.cu", runtime)
        binary = compiled(f"runtime_test_{name}", *command, *flags, *made_of)

        def run(case: str) -> str:
            found = subprocess.run([binary, case], capture_output=True, text=True, check=True)
            return found.stdout.strip()

        return run

    return build


@pytest.fixture(scope="module")
def line(build: Callable[..., Callable[..., str]]) -> Callable[..., str]:
    return build("ptx", *TO_PTX)


CASES = {
    "sound": r"single<float>: 5 x 6 x 7 blocks, 32 threads, 0 bytes, alone, value 7, ptx found",
    "cooperative": r"unbounded: 3 x 1 x 1 blocks, 32 threads, 0 bytes, cooperative, value 7, ptx found",
    "large_shared": r"unbounded: 1 x 1 x 1 blocks, 1024 threads, 204800 bytes, alone, value 7, ptx found",
    "too_many_for_cooperative": r"error: kernel: launching 2 x 2 x 1 blocks of 32 threads with 0 bytes of shared memory: cudaErrorCooperativeLaunchTooLarge \(720\): kernel unbounded: expected at most 3 blocks .* got 4",
    "unasked_shared": r"unbounded: .* 49152 bytes.*\nerror: launching: cudaErrorInvalidValue \(1\): kernel unbounded: expected at most 49152 bytes of shared memory, which is all that comes without asking, got 49168",
    "too_much_shared": r"error: a block of kernel takes 232464 bytes of shared memory, and H100 has 232448",
    "no_blocks": r"error: .*cudaErrorInvalidConfiguration \(9\): kernel unbounded: expected 1 to 2147483647 x 65535 x 65535 blocks, got 0 x 1 x 1",
    "too_many_blocks": r"error: .*cudaErrorInvalidConfiguration \(9\): .* got 1 x 65536 x 1",
    "too_many_threads": r"error: .*cudaErrorInvalidConfiguration \(9\): .*expected 1 to 1024 threads in a block, got 1056",
    "beyond_bounds": r"error: .*cudaErrorInvalidValue \(1\): kernel single<float>: expected at most 128 threads in a block, which its bounds promise, got 160",
    "two_parameters": r"error: launching: cudaErrorInvalidValue \(1\): kernel bounded<float, 3>: expected one parameter of at most 4096 bytes, and it has 2 of 104 bytes",
    "fault": r"error: kernel: launching 1 x 1 x 1 blocks .*: cudaErrorLaunchFailure \(719\): simulator: a fault with its whole text, and the number 13",
    "H100": r"1: 232448 bytes, 3 multiprocessors, 3 and 3 resident",
    "T4": r"6: 65536 bytes, 3 multiprocessors, 0 and 0 resident",
    "A100": r"0: 166912 bytes, 3 multiprocessors, 3 and 3 resident",
    "L4": r"5: 101376 bytes, 3 multiprocessors, 3 and 3 resident",
    "too_old": r"error: .*cudaErrorNoKernelImageForDevice \(209\): kernel unbounded is made for sm_80, and T4 is sm_75",
    "small_shared": r"error: a block of kernel takes 122880 bytes of shared memory, and RTX 4090 has 101376",
    "unknown_device": r"error: simulator: expected one of the devices A100, H100, H200, RTX 3090, RTX 4090, L4, T4, got 'H1000'",
    "fit_H100": r"unbounded: .* 204800 bytes.*",
    "fit_A100": r"unbounded: .* 122880 bytes.*",
    "fit_L4": r"unbounded: .* 65536 bytes.*",
    "fit_nothing": r"error: a block of kernel takes 57344 bytes of shared memory, and L4 has 40960",
    "rehearsal": r"nothing ran",
    "rehearsed_shared": r"error: a block of kernel takes 122880 bytes of shared memory, and L4 has 101376",
    "rehearsed_grid": r"error: kernel would take 1 x 65536 x 1 blocks, and the second and third number are at most 65535",
    "old_driver": r"error: .*cudaErrorInsufficientDriver \(35\): expected a driver for CUDA 13, got one for CUDA 12",
    "no_image": r"error: .*cudaErrorNoKernelImageForDevice \(209\): kernel unbounded is not made for L4",
    "clear": r"8 written, 0 0 3",
}


@pytest.mark.parametrize("case", CASES)
def test_launch(case: str, line: Callable[..., str]) -> None:
    found = line(case)
    assert re.fullmatch(CASES[case], found, re.DOTALL), found


@pytest.mark.parametrize(
    "name, flags, reason",
    [
        ("compressed", TO_PTX[:2], "its PTX is compressed; nvcc needs --no-compress"),
        (
            "machine_code",
            ("-gencode", "arch=compute_80,code=sm_80"),
            "1 pieces of device code and none is PTX",
        ),
    ],
)
def test_a_module_without_plain_ptx(
    name: str, flags: tuple[str, ...], reason: str, build: Callable[..., Callable[..., str]]
) -> None:
    found = build(name, *flags)("sound")
    assert "cudaErrorInvalidKernelImage (200): kernel single<float>: " in found
    assert reason in found
