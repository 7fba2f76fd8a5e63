"""`hardware`: a processor's name tells what its figures may be compared with."""

from __future__ import annotations

import os

import pytest

from pelt_kernels import _hardware
from pelt_kernels.ops import _native as native

XEON = {"model name": "Intel(R) Xeon(R) Processor @ 2.1GHz", "cpu family": "6", "model": "207"}


@pytest.mark.parametrize(
    ("info", "sets", "name"),
    [
        (XEON, ("avx512", "avx2"), "Intel Xeon Processor @ 2.1GHz (avx512, family 6, model 207)"),
        ({"model name": "AMD EPYC"}, ("avx2", "baseline"), "AMD EPYC (avx2)"),
        ({"model name": "AMD  EPYC"}, (), "AMD EPYC"),
    ],
)
def test_a_name_that_says_little_gets_more(info, sets, name, monkeypatch):
    monkeypatch.setattr(native, "cpu_info", lambda field: info.get(field, ""))
    monkeypatch.setattr(native, "instruction_sets", lambda: sets)
    assert _hardware._processor_name() == name


def test_a_system_that_says_nothing_has_the_name_of_the_machine(monkeypatch):
    monkeypatch.setattr(native, "cpu_info", lambda field: "")
    monkeypatch.setattr(native, "instruction_sets", tuple)
    monkeypatch.setattr(_hardware.platform, "processor", lambda: "")
    monkeypatch.setattr(_hardware.platform, "machine", lambda: "riscv64")
    assert _hardware._processor_name() == "riscv64"


def test_this_machine():
    found = _hardware.hardware()
    assert found["cpu"].endswith(f" x {os.cpu_count()}")
    assert found["kind"] == native.processor()
