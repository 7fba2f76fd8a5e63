"""Compiles the Triton kernels of an operator for one GPU without having it, as its calls do.

    python compile_kernels.py cuda:90 lora_linear [case ...]

The launches are recorded from the host code itself, with tensors that hold no memory: so a kernel
is compiled with the arguments and tiles that a call of that case would give it. One line of JSON
for each kernel: its case, name, shared memory, and for CUDA what ptxas says of registers and
spills. It runs in a process of its own, because Triton decides when it is imported whether its
functions are compiled or interpreted.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from ahead_cases import CASES
from cases import Case, make_attributes, make_inputs
from small_operators_cases import SMALL_CASES
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from pelt_kernels.ops import _triton_host as host
from pelt_kernels.ops._contract import Chosen
from pelt_kernels.ops._values import flatten

_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.bool: "*i1",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class Recorder:
    """Stands in for a kernel: compiles it for the target where it would be launched."""

    def __init__(self, name: str, kernel: JITFunction, target: GPUTarget, done: set[str]) -> None:
        self.name, self.kernel, self.target, self.case, self.done = name, kernel, target, "", done

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.compile

    def compile(self, *args: Any, **constants: Any) -> None:
        names = ("num_warps", "num_stages", "enable_fp_fusion")
        options = {name: constants.pop(name) for name in names if name in constants}
        signature, constexprs, attributes = {}, {}, {}
        given = dict(zip(self.kernel.arg_names, args))

        def specialise(value: Any, at: tuple[int, ...], is_special: bool) -> Any:
            """The type of an argument; notes what Triton would compile for its value alone."""
            if isinstance(value, tuple):
                return tuple(specialise(v, (*at, j), is_special) for j, v in enumerate(value))
            is_special = is_special and isinstance(value, int)
            if value is None or (is_special and value == 1):
                constexprs[at] = value
                return "constexpr"
            if isinstance(value, torch.Tensor) or (is_special and value % 16 == 0):
                attributes[at] = [["tt.divisibility", 16]]
            if isinstance(value, torch.Tensor):
                return _TYPES[value.dtype]
            return "fp32" if isinstance(value, float) else "i32"

        for i, (name, parameter) in enumerate(zip(self.kernel.arg_names, self.kernel.params)):
            if name in constants:
                signature[name], constexprs[(i,)] = "constexpr", constants[name]
            else:
                is_special = not parameter.do_not_specialize
                signature[name] = specialise(given[name], (i,), is_special)
        key = repr([self.name, signature, constexprs, options])
        if key in self.done:
            return
        self.done.add(key)
        source = ASTSource(self.kernel, signature, constexprs, attributes)
        found = triton.compile(source, target=self.target, options=options)
        line = {
            "case": self.case,
            "kernel": self.name,
            "shared": found.metadata.shared,
            **(_ptxas(found.asm["ptx"], self.target.arch) if "ptx" in found.asm else {}),
        }
        print(json.dumps(line), flush=True)


def _ptxas(ptx: str, arch: int) -> dict[str, int]:
    """Registers and spilled bytes of a kernel."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        name = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
        command = [get_ptxas(arch).path, "-v", f"-arch={name}", str(source), "-o", f"{folder}/out"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    numbers = (r"Used (\d+) registers", r"(\d+) bytes spill stores")
    registers, spilled = (int(re.findall(pattern, text)[0]) for pattern in numbers)
    return {"registers": registers, "spilled": spilled}


def _run(operator: str, backend: Any, dtype: torch.dtype, case: Case) -> None:
    """Forward and backward of a case, whose launches are recorded instead."""
    module = importlib.import_module(f"pelt_kernels.ops.{operator}.contract")
    contract = module.CONTRACT
    values = make_inputs(contract, case, dtype, "meta", master=True)
    signature = contract.bind(values, make_attributes(contract, case))
    chosen = Chosen(signature, "triton", "")
    if hasattr(backend, "plan"):
        chosen.plan = backend.plan(chosen)
    inputs = dict(zip(contract.input_names, values))
    if contract.has_seed:
        inputs["seed"] = 1
    outputs = backend.forward(chosen, **inputs)
    named = {row.name: output for row, output in zip(contract.output_rows, outputs)}
    dys = {f"d{row.name}": named[row.name] for row in contract.differentiable_rows}
    saved = {row.name: named[row.name] for row in contract.saved_rows}
    needs = {
        name: any(v is not None and v.is_floating_point() for v in flatten([inputs[name]]))
        for name in contract.backward_names
    }
    backend.backward(chosen, needs, **dys, **saved, **inputs)


def main(target: str, operator: str, names: list[str]) -> None:
    kind, arch = target.split(":")
    warp = 64 if arch.startswith("gfx9") else 32
    gpu = GPUTarget(kind, int(arch) if kind == "cuda" else arch, warp)
    host.processors = lambda device: 132
    folder = f"pelt_kernels.ops.{operator}"
    backend = importlib.import_module(f"{folder}.triton")
    done: set[str] = set()
    recorders = []
    for path in sorted(Path(backend.__file__).parent.glob("_triton_*.py")):
        module = importlib.import_module(f"{folder}.{path.stem}")
        for name, kernel in list(vars(module).items()):
            if name.startswith(f"_{operator}") and isinstance(kernel, JITFunction):
                recorders.append(Recorder(name, kernel, gpu, done))
                setattr(module, name, recorders[-1])
    cases = (CASES | SMALL_CASES)[operator]
    for name in names or cases:
        for recorder in recorders:
            recorder.case = name
        _run(operator, backend, *cases[name])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
