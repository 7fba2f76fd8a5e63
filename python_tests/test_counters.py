"""`benchmarks.counters`: the families and pipes of instructions, the bound, and what the kernels of
every operator issue, which is not to grow unseen.
"""

from __future__ import annotations

import re
from pathlib import Path

import parity
import pytest
import torch
from cases.lora_linear import branched

from benchmarks import counters, instructions, pipes, roofline, shapes
from benchmarks.rows import read
from pelt_kernels.ops import OPERATORS, _native

GROWTH = 1.03  # over what is recorded; less is a few instructions outside the loops
# An instruction of PTX at the beginning of its line, perhaps under a predicate or in a block.
INSTRUCTION = re.compile(
    rb"\n[ \t]*(?:\{ *)?(?:@!?%p\d+[ \t]+)?([a-z][a-z0-9]*(?:[.:]+[a-z0-9_]+)+|bra|ret|trap)[ \t;]"
)


def shipped_names() -> set[str]:
    """The names of all instructions in the PTX of `_C_sim`, which holds it as text."""
    data = Path(str(_native.library("_C_sim").__file__)).read_bytes()
    names: set[str] = set()
    begin = data.find(b"\n.version ")
    while begin >= 0:
        end = data.find(b"\0", begin)
        names |= {name.decode() for name in INSTRUCTION.findall(data, begin, end)}
        begin = data.find(b"\n.version ", end)
    return names


@pytest.mark.backend("cuda_sim")
def test_every_shipped_instruction_has_a_family():
    names = shipped_names()
    assert len(names) > 100 and any(name.startswith("mma.") for name in names)
    families = {instructions.family_of(name) for name in names}
    assert families == set(instructions.NAMES)


@pytest.mark.parametrize(
    ("name", "family", "pipe"),
    [
        ("fma.rn.f32", "float arithmetic", "f32"),
        ("mad.lo.s32", "integer and logic", "f32"),
        ("xor.b64", "integer and logic", "int"),
        ("and.pred", "predicates and selects", "int"),
        ("setp.lt.f32", "predicates and selects", "int"),
        ("mov.b32", "moves", ""),
        ("cvt.u32.u64", "conversions", ""),
        ("cvt.rn.bf16x2.f32", "conversions", "int"),
        ("ex2.approx.ftz.f32", "special functions", "special"),
        ("div.rn.f32", "special functions", "special"),
        ("div.s32", "integer and logic", "int"),
        ("ld.param.v2.u32", "loads of parameters", ""),
        ("ld.acquire.gpu.global.s32", "global loads", ""),
        ("ld.shared.v4.f32", "shared loads", ""),
        ("st.global.v4.u32", "global stores", ""),
        ("atom.shared.add.u32", "atomics", ""),
        ("shfl.sync.bfly.b32", "shuffles and votes", ""),
        ("bra.uni", "branches", ""),
    ],
)
def test_families_and_pipes(name, family, pipe):
    assert instructions.family_of(name) == family
    assert instructions.pipe_of(name) == pipe


def test_an_unknown_instruction_is_told():
    with pytest.raises(ValueError, match="known family, got 'wgmma.fence"):
        instructions.family_of("wgmma.fence.sync.aligned")


def launch(*rows: tuple[object, ...], blocks: int = 132, sectors: int = 0) -> pipes.Launch:
    """Of blocks of 128 threads that read sectors, each block its own."""
    return {
        "kernel": "k", "blocks": (blocks, 1, 1), "threads": 128, "shared_bytes": 0,
        "blocks_per_multiprocessor": 2, "cache_sectors_read": sectors, "cache_sectors_written": 0,
        "memory_sectors_read": sectors, "memory_sectors_written": 0, "instructions": rows,
    }  # fmt: skip


def test_the_largest_pipe_is_the_bound_and_waves_are_whole():
    gpu = pipes.GPUS["H200"]
    adds = ("add.s32", "f:1", 4000, 128000, 0, 0, 0, 0)
    found = pipes.seconds(launch(adds, blocks=132), gpu)
    assert found["int"] * gpu.clock == pytest.approx(4000 / 132 / 2)
    assert found["issue"] * gpu.clock == pytest.approx(4000 / 132 / 4)
    # One block more is a second wave for one multiprocessor; the others wait.
    more = pipes.seconds(launch(adds, blocks=133), gpu)
    assert more["int"] * gpu.clock == pytest.approx(2 * 4000 / 133 / 2)
    moves = ("mov.b32", "f:1", 10**6, 128000, 0, 0, 0, 0)
    time, by, _ = pipes.bound([launch(adds, moves)], gpu)
    assert by == "int" and time == found["int"]
    time, by, times = pipes.bound([launch(adds), launch(adds, sectors=10**6)], gpu)
    assert by == "memory" and times["memory"] == pytest.approx(32e6 / 4.3e12)
    assert time == pytest.approx(found["int"] + 32e6 / 4.3e12)


def test_warps_and_loads_under_way():
    gpu = pipes.GPUS["H200"]
    loads = ("ld.global.v4.u32", "f:1", 100, 3200, 51200, 1600, 0, 0)
    warps, under_way, needed = pipes.occupancy(launch(loads, blocks=264), gpu)
    assert warps == 2
    assert under_way == 132 * 8 * 512
    assert needed == pytest.approx(4.3e12 * 600e-9 / under_way)


@pytest.mark.backend("cuda_sim")
@pytest.mark.parametrize("operator", OPERATORS)
def test_kernels_issue_no_more_than_recorded(operator):
    """`python -m benchmarks.counters --record` writes the figures anew, where more is meant."""
    recorded = [row for row in read(counters.RECORDED) if row["op"] == operator]
    found = counters.recorded_of(operator)
    keys = ("op", "case", "dtype", "direction", "request")
    assert [[row[k] for k in keys] for row in found] == [[row[k] for k in keys] for row in recorded]
    for now, before in zip(found, recorded):
        assert now["per_16_bytes"] <= GROWTH * before["per_16_bytes"], (now, before)


@pytest.mark.backend("cuda_sim")
def test_counts_are_of_the_work_and_depend_on_no_seed():
    case = shapes.COUNTED["lora_linear"]
    request = counters.request_of("lora_linear", case, "bfloat16")
    simulator = _native.library("_C_sim")
    rows = []
    for seed in (1, 3):  # under 3 diverged lanes go the other way round
        simulator.set_seed(seed)
        launches = counters.count("lora_linear", case, "bfloat16", request, "H100")["forward"]
        rows.append(counters.row_of("lora_linear", case, "bfloat16", "forward", request, launches))
    simulator.set_seed(1)
    assert rows[0] == rows[1]
    row, z = rows[0], case.sizes
    # All sizes are multiples of the tiles but for the 8 ranks, of which a product takes 16.
    tiles = z["B"] * z["S"] // 16 * (z["Din"] // 16) * (z["Dout"] // 8)
    assert row["mma"] >= tiles
    work = roofline.work("lora_linear", case, torch.bfloat16)
    assert row["least_mma"] == round(work.flops[0] / 4096)
    assert work.bytes[0] <= row["memory_bytes"] <= 1.1 * work.bytes[0]
    assert row["wavefronts"] >= row["least_wavefronts"] > 0
    sources = {line.source for each in launches for line in pipes.instructions_of(each)}
    assert any(source.startswith("csrc/ops/lora_linear/") for source in sources)


@pytest.mark.backend("cuda_sim")
def test_a_counted_device_is_as_large_as_it_is():
    """And that of the tests small again afterwards, also where plans were made for the other."""
    case = shapes.COUNTED["symmetric_kl"]
    found = counters.count("symmetric_kl", case, "bfloat16", "cuda_sim", "A100")
    assert pipes.blocks_of(found["forward"][0]) > 3
    parity.check("symmetric_kl", "cuda_sim", case, "bfloat16")


@pytest.mark.backend("cuda_sim")
def test_dropout_makes_tiles_larger():
    """Each tile of y draws the factors of its rows of x for itself, so that many tiles cost more than
    multiprocessors without work.
    """
    sizes = {"B": 1, "S": 640, "Din": 64, "Dout": 1024, "R_i": (8,), "size_i": (1024,)}
    blocks = []
    for p in (0.0, 0.1):
        case = branched("tiles", sizes, "", [1.0], attributes={"dropout_p": p})
        found = counters.count("lora_linear", case, "bfloat16", "cuda_sim:single", "H100")
        blocks.append(pipes.blocks_of(found["forward"][0]))
    assert blocks[1] < blocks[0]


def test_what_takes_too_long_is_left_out(monkeypatch):
    case = shapes.COUNTED["lora_linear"]
    assert not counters.takes_too_long("lora_linear", case, "bfloat16")
    monkeypatch.setattr(counters, "LONGEST", 1e4)
    assert counters.takes_too_long("lora_linear", case, "bfloat16")


def test_a_wrong_case_is_told(capsys):
    assert counters.main(["--op", "prefix_attention", "--case", "T1"]) == 2
    assert "expected one of B16-S128-E32-P10" in capsys.readouterr().err
