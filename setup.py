"""Builds the compiled modules with CMake; everything else is in pyproject.toml.

PELT_KERNELS_CUDA=1 builds the CUDA kernels as a release holds them, "80;90" for these compute
capabilities alone, 0 none; by default nvcc and this machine's GPUs decide (cmake/gpus.cmake).
``build_ext --inplace --sim`` also builds `_C_sim` for the tests, which no wheel holds.
PELT_KERNELS_BUILD=0 installs a checkout without compiling: its modules are built apart from that.
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
    asked = os.environ.get("PELT_KERNELS_CUDA") or "auto"
    words = {"0": "off", "1": "on", "auto": "auto"}
    if asked in words:  # and what an earlier build was for is forgotten
        return ["-UPELT_KERNELS_CUDA_ARCHS", f"-DPELT_KERNELS_CUDA={words[asked]}"]
    if re.fullmatch(r"\d\d+(;\d\d+)*", asked):
        return ["-DPELT_KERNELS_CUDA=on", f"-DPELT_KERNELS_CUDA_ARCHS={asked}"]
    sys.exit(f"setup.py: expected PELT_KERNELS_CUDA to be 0, 1, auto or 80;90, got '{asked}'")


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


built_apart = os.environ.get("PELT_KERNELS_BUILD") == "0"
modules = [] if built_apart else [Extension("pelt_kernels._C", [])]
setup(ext_modules=modules, cmdclass={"build_ext": CMakeBuild})
