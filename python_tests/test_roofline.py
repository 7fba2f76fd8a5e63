"""`benchmarks.roofline`: what the least time counts, and that nothing measured lies below it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import case_of

from benchmarks import readme, roofline, shapes
from benchmarks.rows import read

FLOAT = torch.float32
T, D, R = 34, 128, 48  # of the adapter's case unipelt: 2 sentences of 17 rows


def test_an_adapter_reads_and_writes_each_tensor_once():
    found = roofline.work("gated_adapter", case_of("gated_adapter", "unipelt"), FLOAT)
    rows, weights = 4 * T * D, 4 * (2 * D * R + R + D + D + 1)
    forward = 2 * rows + weights + T + rows + 4 * 2  # x and residual, mask, y, a gate a sentence
    assert found.bytes[0] == forward
    # Backward reads x, dy and h, and writes dx; the residual's gradient is dy itself.
    small = 4 * (R + D)  # the biases, whose values no gradient needs but whose gradients are made
    backward = 3 * rows + 4 * T * R + 2 * weights + T + 2 * 4 * 2
    assert backward - small <= found.bytes[1] <= backward
    assert found.flops == (4 * T * D * R, 8 * T * D * R)


def test_of_a_bank_only_what_is_picked_is_read_and_all_of_its_gradient_written():
    case = case_of("gated_adapter", "adamix")
    bank, one = (
        roofline.work("gated_adapter", replace(case, sizes={**case.sizes, "M": m}), FLOAT).bytes
        for m in (4, 1)
    )
    member = 4 * (12 * 64 + 12)  # w_down and b_down
    assert bank[0] == one[0]
    assert bank[1] - one[1] == 3 * member


def test_keys_behind_a_mask_and_after_a_query_are_no_work():
    case = case_of("prefix_attention", "unipelt")
    seen = replace(case, fill={"key_mask": 1})
    half = replace(case, fill={"key_mask": 0})
    full = roofline.work("prefix_attention", seen, FLOAT)
    none = roofline.work("prefix_attention", half, FLOAT)
    keys = 4 * 2 * 4 * 17 * 32
    assert full.bytes[0] - none.bytes[0] == 2 * keys
    assert full.flops[0] == 4 * 2 * 4 * 17 * (17 + 10) * 32
    assert none.flops[0] == 4 * 2 * 4 * 17 * 10 * 32
    causal = case_of("prefix_attention", "causal")  # 13 queries, the last sees all 19 keys
    pairs = sum(range(7, 20)) + 13 * 10
    assert shapes.flops("prefix_attention", causal)[0] == 4 * 2 * 4 * pairs * 32


def test_a_cache_only_makes_the_limit_lower(monkeypatch):
    monkeypatch.setitem(roofline._bytes, "cpu", {1 << 16: 100.0, 1 << 20: 50.0, 1 << 28: 10.0})
    rates = [
        roofline.byte_rate("cpu", size) for size in (1, 1 << 16, (1 << 20) - 1, 1 << 20, 1 << 30)
    ]
    assert rates == [100, 100, 100, 50, 10]
    monkeypatch.setitem(roofline._products, ("cpu", FLOAT), 1e3)
    work = roofline.Work((1000, 2 << 20), (2e4, 4e3))
    # Forward is bound by its products, backward by its bytes.
    assert roofline.least_seconds(work, FLOAT, "cpu") == (20.0, 20.0 + (2 << 20) / 50)


def test_larger_working_sets_are_no_faster(monkeypatch):
    monkeypatch.setitem(roofline.WORKING_SETS, "cpu", (1 << 14, 1 << 16, 1 << 18))
    rates = list(roofline._measured_bytes("cpu").items())
    assert [size for size, _ in rates] == [1 << 18, 1 << 16, 1 << 14]
    assert rates[0][1] <= rates[1][1] <= rates[2][1]


def test_bfloat16_has_what_its_instructions_allow(monkeypatch):
    monkeypatch.setitem(roofline._products, ("cpu", FLOAT), 100.0)
    monkeypatch.setitem(roofline._products, ("cpu", torch.bfloat16), 150.0)
    for name, rate in (("amx", 1600), ("avx512_bf16", 200), ("avx512", 150), ("avx2", 150)):
        monkeypatch.setattr(roofline._native, "instruction_sets", lambda name=name: (name,))
        assert roofline.product_rate("cpu", torch.bfloat16) == rate


def test_a_second_measurement_keeps_what_is_faster(monkeypatch):
    monkeypatch.setattr(roofline, "_bytes", {"cpu": {1: 10.0, 2: 5.0}})
    monkeypatch.setattr(roofline, "_products", {("cpu", FLOAT): 7.0})
    monkeypatch.setattr(roofline, "_measured_bytes", lambda device: {1: 8.0, 2: 6.0})
    monkeypatch.setattr(roofline, "_measured_products", lambda device, dtype: 9.0)
    roofline.measure_again()
    assert roofline._bytes == {"cpu": {1: 10.0, 2: 6.0}} and roofline._products == {
        ("cpu", FLOAT): 9.0
    }


@pytest.mark.parametrize("path", readme.operator_files(), ids=lambda path: path.stem)
def test_nothing_that_was_measured_lies_below_its_limit(path):
    """Rows from before the limit was one have none: `limit_us` is not there."""
    for row in read(path):
        assert row["us"] >= row.get("limit_us", 0), (row["op"], row["case"], row["direction"])
