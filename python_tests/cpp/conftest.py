"""What several tests of compiled kernels need."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import parity
import pytest
import torch
from parity import run
from torch import Tensor

from pelt_kernels.ops import _native as native

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"


@pytest.fixture
def same_bits(threads):
    """same_bits(operator, backend, case, precision, counts): results are the same bits on each of these
    numbers of threads as on one, but for those in ``but``.
    """

    def same_bits(operator, backend, case, precision, counts, but=()):
        threads(1)
        alone = run(operator, backend, case, precision)
        for count in counts:
            threads(count)
            for name, value in run(operator, backend, case, precision).items():
                assert name in but or torch.equal(value, alone[name]), f"{name}, {count} threads"

    return same_bits


@pytest.fixture(scope="session")
def nvcc() -> Path:
    """The CUDA compiler, where CMakeLists.txt looks for it."""
    packages = f"{sysconfig.get_path('purelib')}/nvidia/cu13"
    homes = (os.environ.get("CUDA_HOME", ""), "/usr/local/cuda", packages)
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes)])
    found = shutil.which("nvcc", path=path)
    if found is None and "cuda_sim" in parity.REQUIRED:
        pytest.fail("backend cuda_sim is required, and its tests need nvcc, which is not there")
    return Path(found) if found else pytest.skip("no nvcc; `make build-sim` installs it")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """compiled(name, *command): the file that a compiler writes with ``-o``, once for all workers of a
    session.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # which the workers share

    def compiled(name: str, *command: str | Path) -> Path:
        out, unfinished = folder / name, folder / f"unfinished-{name}"
        with open(folder / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not out.exists():
                subprocess.run([*command, "-o", unfinished], check=True)
                unfinished.rename(out)
        return out

    return compiled


@pytest.fixture(scope="session")
def ptx_of(nvcc: Path, compiled: Callable[..., Path]) -> Callable[[str], str]:
    """ptx_of(name): the PTX of a file beside this one."""
    command = (nvcc, "-std=c++17", "-arch=compute_80", "-ptx", "-lineinfo", f"-I{CSRC}")

    def ptx_of(name: str) -> str:
        source = HERE / f"{name}.cu"
        return compiled(f"{name}.ptx", *command, "--Werror=all-warnings", source).read_text()

    return ptx_of


@pytest.fixture
def launch(ptx_of: Callable[[str], str]) -> Iterator[Callable[..., Tensor]]:
    """launch(file, kernel, seed, ...): runs a kernel of sound.cu or faults.cu on the simulator and
    returns its output, `words` numbers that are -1 where the kernel writes nothing.
    """
    simulator = native.library("_C_sim")

    def launch(
        file: str,
        kernel: str,
        seed: int = 1,
        given: Tensor | None = None,
        words: int = 128,
        is_output_written: bool = False,
        blocks: tuple[int, int, int] = (1, 1, 1),
        threads: int = 128,
        shared_bytes: int = 1024,
        **how: object,
    ) -> Tensor:
        if given is None:
            given = torch.arange(1000, 1128, dtype=torch.int32)
        out = torch.full((words,), -1, dtype=torch.int32)
        counters = torch.zeros(4, dtype=torch.int32)
        memory = [(given, True), (out, is_output_written), (counters, True)]
        simulator.set_seed(seed)
        simulator.run_ptx(
            ptx_of(file), kernel, blocks=blocks, threads=threads, shared_bytes=shared_bytes, **how,
            params=struct.pack("<3Q", *(tensor.data_ptr() for tensor, _ in memory)),
            memory=[(t.data_ptr(), t.numel() * t.element_size(), known) for t, known in memory],
        )  # fmt: skip
        return out

    yield launch
    simulator.set_seed(1)
    simulator.set_device("H100")
