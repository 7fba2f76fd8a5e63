"""The stages of `benchmarks/gpu_check.sh`, in the order of their value.

On a CPU each is the same command on the simulator or the CPU kernels, as short as it can be, and
stand-ins take the place of the compiler and of NVIDIA's sanitizers only.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

# What is wanted first is measured first.
OPERATORS = ("gated_adapter", "lora_linear", "prefix_attention", "symmetric_kl", "masked_weight")
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")
# pytest's report of failures, also where it was interrupted.
FAILED_TESTS = r"^FAILED .*|^ERROR .*"
SANITIZED = r"^=+ ERROR SUMMARY: [1-9].*|^=+ RACECHECK SUMMARY: [1-9].*"
PYTEST = ("-m", "pytest", "-q", "-rfE", "--tb=short")


@dataclass(frozen=True)
class Stage:
    """A command, the seconds it may take at ``most``, and those under which it is not begun.

    Stages with the same ``group`` run side by side where they follow each other. What comes after
    one that ``is_needed`` is void without it. ``sign_of_failure`` in its log is a failure however
    the command ends, ``makes`` a pattern of files without which it is not done.
    """

    name: str
    command: tuple[str, ...]
    most: float
    least: float = 10
    group: str = ""
    is_needed: bool = False
    sign_of_failure: str = ""
    makes: str = ""
    environment: dict[str, str] = field(default_factory=dict)


def plan(device: str, folder: Path, jobs: int) -> list[Stage]:
    """All stages for a device; ``folder`` gets their rows."""
    of_device = _On(device, folder, jobs)
    stages = [
        of_device.machine(),
        of_device.build(),
        of_device.parity(),
        *map(of_device.sanitizer, SANITIZERS),
        of_device.benchmark("roofline", "roofline", 40, "--dtypes", "bfloat16,float32"),
        *map(of_device.speed, OPERATORS),
        of_device.forms(),
        of_device.compiled(),
        of_device.steps(),
        of_device.host(),
    ]
    if importlib.util.find_spec("triton"):
        stages.append(of_device.parity_of_triton())
        stages += [of_device.speed(operator, "triton") for operator in OPERATORS]
    return stages


@dataclass(frozen=True)
class _On:
    device: str
    folder: Path
    jobs: int

    def machine(self) -> Stage:
        versions = (
            f"{sys.executable} -c 'import torch, transformers as t;"
            " print(torch.__version__, t.__version__)'"
        )
        facts = ["grep -m 1 'model name' /proc/cpuinfo", "nproc"]
        if self.device == "cuda":
            facts += ["nvidia-smi", "nvcc --version"]
        facts += [versions]
        return Stage("machine", ("bash", "-c", " && ".join(facts)), 40, is_needed=True)

    def build(self) -> Stage:
        """For this GPU alone, the kernels of one file beside each other, and with the lines that
        sanitizers name.
        """
        if self.device == "cpu":
            command = (sys.executable, "-c", "from pelt_kernels import _C, _C_sim")
            return Stage("build", command, 30, is_needed=True)
        return Stage(
            "build",
            (sys.executable, "setup.py", "build_ext", "--inplace"),
            220,
            least=60,
            is_needed=True,
            makes="pelt_kernels/_C.*.so",
            environment={
                "PELT_KERNELS_CUDA": _compute_capability(),
                "CUDAFLAGS": "-lineinfo --split-compile=0",
            },
        )

    def parity(self) -> Stage:
        if self.device == "cuda":
            chosen = ("-k", "cuda and not cuda_sim and not triton", "--require-backend=cuda")
        else:
            chosen = ("-m", "quick", "-k", "cuda_sim and symmetric_kl")
        return self._tests("parity", 200, *chosen, group="tests")

    def sanitizer(self, tool: str) -> Stage:
        """One of NVIDIA's tools over the short list in bfloat16, beside the others. Without torch's
        allocator, whose blocks are larger than the tensors in them, and of kernels the package's
        own, which end in what they are compiled for. initcheck watches torch's too, which write
        what ours read, and is blind where memory is poisoned.
        """
        chosen = ("-m", "quick", "-k", "cuda and not cuda_sim and bfloat16 and not master")
        watched: tuple[str, ...] = ("--kernel-name", "kns=_sm80,kns=_sm90a")
        before: tuple[str, ...] = ()
        if tool == "initcheck":
            watched = ()
            chosen += ("--without-poison",)
        if self.device == "cpu":
            chosen = ("-k", "plain and cuda_sim and bfloat16 and not master", *chosen[4:])
        else:
            before = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit",
                      "20", "--target-processes", "all", *watched)  # fmt: skip
        return Stage(
            tool,
            (*before, sys.executable, *PYTEST, "-p", "no:cacheprovider",
             "python_tests/ops/test_parity.py", *chosen),
            200,
            least=40,
            group="tests",
            sign_of_failure=f"{FAILED_TESTS}|{SANITIZED}",
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )  # fmt: skip

    def speed(self, operator: str, backend: str = "cuda") -> Stage:
        """Times one operator by this backend; the rows are added as they come."""
        if self.device == "cuda":
            more = ("--without", "triton") if backend == "cuda" else ("--backends", "triton")
            more += ("--seconds", "0.15")
        else:
            more = ("--cases", _SMALL[operator], "--dtypes", "float32", "--seconds", "0.001")
            more += ("--backends", _requests_on_cpu(operator, backend))
        name = operator if backend == "cuda" else f"{operator}-{backend}"
        return self.benchmark(
            name, "run", 80, "--op", operator, *more, "--no-compile",
            "--json", self._file("operators"), "--resume",
        )  # fmt: skip

    def forms(self) -> Stage:
        """On a GPU the package's table, by which later stages choose, and a copy of it."""
        rows, table = self._file("operators"), self._file("forms")
        command = f"{sys.executable} -m benchmarks.forms '{rows}'"
        if self.device == "cuda":
            command += f" && cp pelt_kernels/ops/forms.jsonl '{table}'"
        else:
            command += f" --table '{table}'"
        return Stage("forms", ("bash", "-c", command), 30, least=5)

    def compiled(self) -> Stage:
        cases = "T8192-D768-R64,T8192-D4096-R64" if self.device == "cuda" else "T128-D768-R48"
        return self.benchmark(
            "torch.compile", "run", 80, "--op", "gated_adapter", "--cases", cases, "--without",
            "triton", "--seconds", "0.1", "--json", self._file("compile"), "--resume",
            *self._small("--dtypes", "float32", "--backends", "cpu"),
        )  # fmt: skip

    def steps(self) -> Stage:
        methods = "head,unipelt,adapter,lora,prefix" if self.device == "cuda" else "head"
        return self.benchmark(
            "steps", "train_step", 90, "--model", "bert-base", "--methods", methods,
            "--json", self._file("steps"), *self._small("--steps", "1"),
        )  # fmt: skip

    def host(self) -> Stage:
        command = (sys.executable, "-m", "benchmarks.host_overhead", "--json", self._file("host"))
        return Stage("host", (*command, *self._small("--rounds", "1")), 60)

    def parity_of_triton(self) -> Stage:
        if self.device == "cuda":
            chosen = ("-k", "triton and not ahead", "--require-backend=triton")
            return self._tests("parity-triton", 300, *chosen)
        chosen = ("-m", "quick", "-k", "triton and symmetric_kl")
        return self._tests("parity-triton", 300, *chosen, TRITON_INTERPRET="1")

    def benchmark(self, name: str, module: str, most: float, *arguments: str) -> Stage:
        command = (sys.executable, "-m", f"benchmarks.{module}", "--device", self.device)
        most = most if self.device == "cuda" else 600
        return Stage(name, (*command, *arguments), most, sign_of_failure=r"^failed: (?!interr).*")

    def _tests(self, name: str, most: float, *chosen: str, group: str = "", **more: str) -> Stage:
        workers: tuple[str, ...] = ()
        if self.jobs > 1 and importlib.util.find_spec("xdist"):
            workers = ("-n", str(max(self.jobs - len(SANITIZERS), 2)))
        command = (sys.executable, *PYTEST, "--maxfail=20", *workers, "python_tests/ops", *chosen)
        return Stage(name, command, most, least=40, group=group, sign_of_failure=FAILED_TESTS,
                     environment={"OMP_NUM_THREADS": "1", **more})  # fmt: skip

    def _small(self, *arguments: str) -> tuple[str, ...]:
        return arguments if self.device == "cpu" else ()

    def _file(self, name: str) -> str:
        return str(self.folder / f"{name}.jsonl")


# The smallest case of each operator, for machines without a GPU.
_SMALL = {
    "gated_adapter": "T128-D768-R48",
    "lora_linear": "T1024-D768-R8-lora",
    "prefix_attention": "B16-S128-E32-P10",
    "symmetric_kl": "T512-C2-tokens",
    "masked_weight": "768x768-half",
}


def _requests_on_cpu(operator: str, backend: str) -> str:
    """The best kernels beside eager, between which `benchmarks.forms` has something to choose; in
    the place of Triton's the slowest.
    """
    from pelt_kernels.ops import _dispatch

    requests = _dispatch.every_request(operator, "cpu")
    return f"{requests[0]},eager" if backend == "cuda" else requests[-1]


def _compute_capability() -> str:
    """Of the first GPU, without the dot; ``1`` where nvidia-smi does not tell, which builds for all
    that a release is built for.
    """
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, text=True, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "1"
    return done.stdout.strip().replace(".", "")
