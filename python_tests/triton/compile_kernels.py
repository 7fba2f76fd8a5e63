"""Compiles the Triton kernels of gated_adapter for one GPU without having it, as its calls do.

    python compile_kernels.py cuda:90 [case ...]

The launches are recorded from the host code itself, with tensors that hold no memory: so a kernel
is compiled with the arguments and tiles that a call of that case would give it. One line of JSON
for each kernel: its case, name, shared memory, and for CUDA what ptxas says of registers and
spills. It runs in a process of its own, because Triton decides when it is imported whether its
functions are compiled or interpreted.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from pelt_kernels.ops import _triton_host as host
from pelt_kernels.ops._cases import Case, make_attributes, make_inputs
from pelt_kernels.ops.gated_adapter import contract
from pelt_kernels.ops.gated_adapter import triton as backend

_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.bool: "*i1",
    torch.int64: "*i64",
}
_EVERY_INPUT = (
    "w_down:1 b_down:1 w_up:1 b_up:1 down_index:1 up_index:1 pre_norm_weight pre_norm_bias "
    "post_norm_weight post_norm_bias scale gate_weight gate_bias mask residual"
)
_BERT = {"B": 16, "S": 128, "D": 768, "R": 48}
_UNIPELT = "b_down b_up gate_weight gate_bias mask residual"
_POOLED = {"pooling": "masked_mean", "residual_from": "tensor"}
# Names with the dtype of activations; parameters are float32 masters beside 16 bits.
CASES = {
    "unipelt-bf16": (torch.bfloat16, Case("", _BERT, _UNIPELT, _POOLED)),
    "unipelt-f16": (torch.float16, Case("", _BERT, _UNIPELT, _POOLED)),
    "plain-f32": (torch.float32, Case("", _BERT, "b_down b_up", {"activation": "gelu"})),
    "rank_128-bf16": (torch.bfloat16, Case("", {**_BERT, "R": 128}, "b_down b_up gate:1")),
    "rank_256-bf16": (torch.bfloat16, Case("", {**_BERT, "R": 256}, "b_down b_up")),
    "rank_256-f32": (torch.float32, Case("", {**_BERT, "R": 256}, "b_down b_up")),
    "token-bf16": (
        torch.bfloat16,
        Case("", _BERT, "b_up gate_weight gate_bias", {"pooling": "token", "activation": "silu"}),
    ),
    "everything-bf16": (
        torch.bfloat16,
        Case(
            "",
            {**_BERT, "D": 1000, "R": 20, "M": 4, "M_up": 3},
            _EVERY_INPUT,
            {**_POOLED, "activation": "gelu_tanh", "dropout_p": 0.1},
        ),
    ),
    "one_row-f16": (
        torch.float16,
        Case("", {"B": 1, "S": 1, "D": 64, "R": 1, "M": 1, "M_up": 1}, _EVERY_INPUT, _POOLED),
    ),
    "skip-bf16": (
        torch.bfloat16,
        Case("", _BERT, _UNIPELT, {**_POOLED, "skip_below": 0.5, "activation": "tanh"}),
    ),
}


class Recorder:
    """Stands in for a kernel: compiles it for the target where it would be launched."""

    def __init__(self, kernel: JITFunction, target: GPUTarget, done: set[str]) -> None:
        self.kernel, self.target, self.case, self.done = kernel, target, "", done

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.compile

    def compile(self, *args: Any, **constants: Any) -> None:
        names = ("num_warps", "num_stages", "enable_fp_fusion")
        options = {name: constants.pop(name) for name in names if name in constants}
        given = dict(zip(self.kernel.arg_names, args))
        signature, constexprs, attributes = {}, {}, {}
        for i, (name, parameter) in enumerate(zip(self.kernel.arg_names, self.kernel.params)):
            value = given.get(name)
            is_special = isinstance(value, int) and not parameter.do_not_specialize
            if name in constants or value is None or (is_special and value == 1):
                signature[name], constexprs[name] = "constexpr", constants.get(name, value)
            elif isinstance(value, torch.Tensor):
                signature[name] = _TYPES[value.dtype]
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, torch.Tensor) or (is_special and value % 16 == 0):
                attributes[(i,)] = [["tt.divisibility", 16]]
        key = json.dumps([self.kernel.__name__, signature, constexprs, options])
        if key in self.done:
            return
        self.done.add(key)
        source = ASTSource(self.kernel, signature, constexprs, attributes)
        found = triton.compile(source, target=self.target, options=options)
        line = {
            "case": self.case,
            "kernel": self.kernel.__name__,
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


def _run(dtype: torch.dtype, case: Case) -> None:
    """Forward and backward of a case, whose launches are recorded instead."""
    tables = contract.CONTRACT
    values = make_inputs(tables, case, dtype, "meta", master=True, draws=contract.DRAWS)
    attributes = make_attributes(tables, case)
    call = tables.bind(values, attributes)
    inputs = dict(zip(tables.input_names, values))
    y, gate_value, h = backend.forward(call, seed=1, **inputs)
    needs = {n: v is not None and v.is_floating_point() for n, v in inputs.items()}
    needs = {name: need for name, need in needs.items() if name in tables.backward_names}
    backend.backward(call, needs, y, gate_value, h, seed=1, **inputs)


def main(target: str, names: list[str]) -> None:
    kind, arch = target.split(":")
    warp = 64 if arch.startswith("gfx9") else 32
    gpu = GPUTarget(kind, int(arch) if kind == "cuda" else arch, warp)
    host.processors = lambda device: 132
    modules = [backend._kernels(name) for name in ("fwd", "bwd_rows", "bwd_columns")]
    done: set[str] = set()
    recorders = []
    for module in modules:
        for name, kernel in list(vars(module).items()):
            if name.startswith("_gated_adapter"):
                recorders.append(Recorder(kernel, gpu, done))
                setattr(module, name, recorders[-1])
    for name in names or CASES:
        for recorder in recorders:
            recorder.case = name
        _run(*CASES[name])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
