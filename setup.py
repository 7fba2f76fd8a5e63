"""Builds the compiled modules with CMake; everything else is in pyproject.toml.

PELT_KERNELS_CUDA=1 builds the CUDA kernels as a release holds them, 0 leaves them out; by default
nvcc and a GPU decide. PELT_KERNELS_CUDA=90 builds them for that compute capability alone, which is
sooner done; of several there are semicolons between.
``build_ext --inplace --sim`` also builds `_C_sim` for the tests, which no wheel holds.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# Tools installed by pip stand beside the interpreter, whose folder need not be on PATH.
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def cuda() -> list[str]:
    asked = os.environ.get("PELT_KERNELS_CUDA", "auto")
    if re.fullmatch(r"\d\d+(;\d\d+)*", asked):
        return ["-DPELT_KERNELS_CUDA=on", f"-DPELT_KERNELS_CUDA_ARCHS={asked}"]
    if asked not in ("0", "1", "auto"):
        sys.exit(
            "setup.py: expected PELT_KERNELS_CUDA to be 0, 1, auto or compute capabilities (80;90),"
            f" got '{asked}'"
        )
    every = "-UPELT_KERNELS_CUDA_ARCHS"  # which an earlier build may have set
    if asked != "auto":
        return [every, f"-DPELT_KERNELS_CUDA={'on' if asked == '1' else 'off'}"]
    nvcc = shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()
    missing = ["nvcc"] * (not nvcc) + ["GPU"] * (not Path("/dev/nvidiactl").exists())
    found = f"no {' and no '.join(missing)}, no CUDA kernels" if missing else "CUDA kernels too"
    print(f"pelt_kernels: {found} (PELT_KERNELS_CUDA=0 or 1 decides)", file=sys.stderr)
    return [every, f"-DPELT_KERNELS_CUDA={'off' if missing else 'on'}"]


class CMakeBuild(build_ext):
    user_options = [*build_ext.user_options, ("sim", None, "build the test module _C_sim too")]
    sim = None

    def finalize_options(self):
        if self.sim:
            self.distribution.ext_modules.append(Extension("pelt_kernels._C_sim", []))
        super().finalize_options()

    def build_extensions(self):
        build = ROOT / "build" / sys.implementation.cache_tag
        cmake, ninja = (shutil.which(tool, path=PATH) or tool for tool in ("cmake", "ninja"))
        options = [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}",
                   f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
                   f"-DPELT_KERNELS_SIM={'ON' if self.sim else 'OFF'}", *cuda()]  # fmt: skip
        configure = [cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *options]
        if subprocess.run(configure, stdout=subprocess.DEVNULL).returncode:
            sys.exit("setup.py: CMake found no way to build, for the reason above")
        names = {ext.name: ext.name.rpartition(".")[2] for ext in self.extensions}
        subprocess.run([cmake, "--build", build, "--target", *names.values()], check=True)
        for module, name in names.items():
            target = Path(self.get_ext_fullpath(module))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(next(build.glob(f"{name}.*")), target)


setup(ext_modules=[Extension("pelt_kernels._C", [])], cmdclass={"build_ext": CMakeBuild})
