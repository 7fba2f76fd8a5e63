"""`hardware`: a processor's name tells what its figures may be compared with."""

from __future__ import annotations

import platform

import pytest

from pelt_kernels.training import report

AVX2 = "fpu sse2 avx avx2 fma f16c"
AVX512 = f"{AVX2} avx512f avx512dq avx512bw avx512vl"


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (f"{AVX512} avx512_bf16 amx_bf16 amx_tile amx_int8", "amx"),
        (f"{AVX512} avx512_bf16", "avx512_bf16"),
        (AVX512, "avx512"),
        (f"{AVX2} avx512f", "avx2"),
        (AVX2, "avx2"),
        ("fpu sse2", platform.machine()),
        ("", platform.machine()),
    ],
)
def test_the_widest_instruction_set_that_the_system_allows(flags, name):
    assert report._instruction_set({"flags": flags}) == name


def test_a_name_that_says_little_gets_more():
    xeon = {"vendor_id": "GenuineIntel", "model name": "Intel(R) Xeon(R) Processor @ 2.1GHz",
            "cpu family": "6", "model": "207", "flags": AVX512}  # fmt: skip
    assert report._described(xeon) == "Intel Xeon Processor @ 2.1GHz (avx512, family 6, model 207)"
    assert report._kind(xeon) == "Intel avx512"
    epyc = {"vendor_id": "AuthenticAMD", "model name": "AMD EPYC", "flags": AVX2}
    assert report._described(epyc) == "AMD EPYC (avx2)" and report._kind(epyc) == "AMD avx2"


def test_a_system_that_says_nothing_has_the_machine_s_name():
    assert report._kind({}) == platform.machine()
    assert platform.machine() in report._described({})


def test_this_machine():
    found = report.hardware()
    assert found["cpu"].endswith(f" x {report.os.cpu_count()}") and found["kind"]
    assert report.instruction_set() in found["cpu"]
