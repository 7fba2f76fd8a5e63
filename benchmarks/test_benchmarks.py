"""The same measurements for pytest-benchmark, which keeps and compares runs:

pytest benchmarks --benchmark-only [--benchmark-compare]
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import run, shapes
from benchmarks.contenders import contenders
from benchmarks.from_tests import parity
from pelt_kernels.ops import OPERATORS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = [
    pytest.param(operator, case, direction, name, id=f"{operator}-{case.id}-{direction}-{name}")
    for operator in OPERATORS
    for case in shapes.cases_of(operator, DEVICE)
    if case.is_quick
    for direction in ("forward", "forward+backward")
    for name in ("plain", *run.backends_of(operator, DEVICE))
]


@pytest.mark.parametrize(("operator", "case", "direction", "name"), ROWS)
def test_time(benchmark, operator, case, direction, name):
    dtype = run.DTYPES[DEVICE].split(",")[0]
    is_plain = name == "plain"
    refusal = "" if is_plain else parity.why_refused(operator, name, case, dtype)
    if refusal:
        pytest.skip(refusal)
    requests, baselines = ([], [name]) if is_plain else ([name], [])
    call = contenders(operator, case, dtype, DEVICE, requests, baselines)[direction][name]

    def until_done():
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(until_done)
