"""The machine code of the CUDA kernels, without a GPU: what ptxas reserved, and what their loops are.

`make cuda` builds `_C` with the kernels and runs this on it. CI builds a part of what a release
holds (.ci/run).
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def module(request):
    path = request.config.getoption("--cuda-module")
    if not path:
        pytest.skip("no _C with CUDA kernels was named: make cuda builds one and runs this")
    return Path(path).resolve(strict=True)


def _tool(name):
    """From the CUDA toolkit, or from Triton's package, which carries the same."""
    found = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None:
        found = str(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name)
    return found or pytest.fail(f"{name}: neither a CUDA toolkit nor Triton's package has it")


def _dump(module, *options):
    command = [_tool("cuobjdump"), *options, str(module)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _sass_of(module, architecture):
    """Kernel -> its instructions."""
    found: dict[str, list[str]] = {}
    for line in _dump(module, "-sass", "-arch", architecture).splitlines():
        if match := re.search(r"Function : (\S+)", line):
            instructions = found.setdefault(match[1], [])
        elif match := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+([^;]+);", line):
            instructions.append(match[1].strip())
    assert found
    return found


@pytest.fixture(scope="module")
def architectures(module):
    """For which the module holds machine code, such as sm_90."""
    return sorted(set(re.findall(r"sm_\d+", _dump(module, "--list-elf"))))


@pytest.fixture(scope="module")
def sass(module, architectures):
    """Architecture -> kernel -> its instructions, of those for which budgets are stated."""
    return {name: _sass_of(module, name) for name in architectures if name in ("sm_80", "sm_90")}


def test_no_kernel_spills_or_has_a_stack(module):
    usage = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)",
        _dump(module, "--dump-resource-usage"),
    )
    assert usage
    assert not [row for row in usage if row[2:] != ("0", "0")]


# The most instructions of any kernel of that name in bfloat16 and float32: what does not fit the
# caches of instructions is fetched again in every turn of its loops. What the kernels hold is in
# benchmarks/results/predictions_h200.md.
MOST_INSTRUCTIONS = {
    "gated_adapter_bwd_general_sm80": 43_000,
    "gated_adapter_bwd_sm80": 5_000,
    "gated_adapter_bwd_weights_sm80": 5_000,
    "gated_adapter_fwd_general_sm80": 10_500,
    "gated_adapter_fwd_sm80": 5_000,
    "gated_adapter_round_sm80": 100,
    "image_sm80": 100,
    "lora_linear_bwd_weights_sm80": 6_000,
    "lora_linear_expand_sm80": 3_500,
    "lora_linear_gates_sm80": 3_000,
    "lora_linear_rows_sm80": 2_000,
    "lora_linear_shrink_sm80": 3_000,
    "lora_linear_single_bwd_sm80": 8_000,
    "lora_linear_single_fwd_sm80": 5_500,
    "lora_linear_spread_sm80": 4_000,
    "masked_weight_bwd_sm80": 4_500,
    "masked_weight_bwd_sums_sm80": 3_000,
    "masked_weight_fwd_sm80": 9_500,
    "prefix_attention_bwd_bias_sm80": 4_500,
    "prefix_attention_bwd_keys_sm80": 6_000,
    "prefix_attention_bwd_queries_sm80": 5_500,
    "prefix_attention_bwd_sums_sm80": 200,
    "prefix_attention_fwd_sm80": 9_000,
    "symmetric_kl_bwd_sm80": 1_000,
    "symmetric_kl_fwd_sm80": 2_000,
}


def test_kernels_keep_their_budgets_of_instructions(sass):
    for architecture, kernels in sass.items():
        found: dict[str, int] = {}
        for name, lines in kernels.items():
            kernel = re.search(r"\d([a-z][a-z_]*_sm80)", name)
            assert kernel, name
            if "3f16" not in name:
                found[kernel[1]] = max(found.get(kernel[1], 0), len(lines))
        assert found.keys() == MOST_INSTRUCTIONS.keys()
        over = {name: count for name, count in found.items() if count > MOST_INSTRUCTIONS[name]}
        assert not over, architecture


def test_it_holds_what_it_names(module, architectures, sass):
    said = loaded(module, "print(m.build_info()['cuda_capabilities'])").strip().split(", ")
    assert architectures == sorted(f"sm_{name.replace('.', '')}" for name in said)
    assert sass
    assert re.search(r"sm_80|compute_80", _dump(module, "--list-ptx"))


def test_matrix_products_run_on_the_matrix_units(sass):
    """Kernels that only sum or copy have no product; every operator has one that does.

    Except for masked_weight, where TF32 would give scores another order, and the mask with it, and
    for symmetric_kl, whose many multiplications are those of its exponentials.
    """
    small = ("masked_weight", "symmetric_kl")
    for kernels in sass.values():
        with_product = {name for name, lines in kernels.items() if any("HMMA" in s for s in lines)}
        for operator in ("gated_adapter", "lora_linear", "prefix_attention"):
            assert any(operator in name for name in with_product), operator
        scalar = [
            name
            for name, lines in kernels.items()
            if name not in with_product
            and not any(operator in name for operator in small)
            and sum("FFMA" in line for line in lines) > 64
        ]
        assert not scalar


def test_matrix_loops_move_sixteen_bytes_at_a_time(sass):
    wide = re.compile(r"(LDG|LDS|LDGSTS)\.[.\w]*128|LDSM\.\S*M88\.4")
    narrow = [
        name
        for kernels in sass.values()
        for name, lines in kernels.items()
        if any("HMMA" in line for line in lines) and not any(wide.search(line) for line in lines)
    ]
    assert not narrow


def test_it_imports_without_a_driver(module):
    needed = subprocess.run(["ldd", str(module)], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in needed
    assert loaded(module, "print(m.build_info()['cuda'])").strip() == "True"


def loaded(module, code):
    """What the code prints that has the module as ``m``."""
    load = (
        "import importlib.util as u; s = u.spec_from_file_location('_C', __import__('sys').argv[1]);"
        "m = u.module_from_spec(s); s.loader.exec_module(m);"
    )
    command = [sys.executable, "-c", load + code, str(module)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
