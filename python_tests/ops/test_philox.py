"""Dropout's bits: the compiled module and torch's integer arithmetic agree, and both are
Philox4x32-10.
"""

from __future__ import annotations

import pytest
import torch

from pelt_kernels.ops import _native as native
from pelt_kernels.ops import _philox as philox

# counter (four words), key (two words), output: Random123's kat_vectors.
KNOWN = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]
CPU = torch.device("cpu")
needs_module = pytest.mark.skipif(
    not native.can_fill_dropout(CPU), reason="the compiled module _C is not there"
)


@pytest.fixture
def by_torch(monkeypatch):
    """The functions of `_philox`, without the compiled module."""

    def call(function, *args):
        with monkeypatch.context() as patch:
            patch.setattr(native, "can_fill_dropout", lambda device: False)
            return function(*args)

    return call


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def _words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@needs_module
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers_of_the_compiled_module(counter, key, expected, isa):
    c, k = _words(counter), _words(key)
    found = native.library("_C").philox4x32_10(
        counter=(c[0] | c[1] << 32, c[2] | c[3] << 32), key=k[0] | k[1] << 32, isa=isa
    )
    assert found == _words(expected)


def test_known_answer_of_torch():
    """The torch path takes counters whose upper half is 0, as the contract's are."""
    zero = torch.zeros(1, dtype=torch.int64)
    assert [int(word) for word in philox.philox4x32(zero, zero, 0)] == _words(KNOWN[0][2])


@needs_module
@pytest.mark.parametrize(
    "shape", [(1, 1), (3, 5), (7, 4), (5, 30), (64, 158), (2, 40000), (0, 8), (3, 0)]
)
@pytest.mark.parametrize(
    ("p", "seed"), [(0.1, 0), (0.5, 7), (0.999, 2**40 + 3), (1e-12, 5), (0.3, 2**64 - 1)]
)
def test_both_ways_give_the_same_bits(shape, p, seed, by_torch, isa, threads):
    mask = torch.empty(shape, dtype=torch.bool)
    native.fill_dropout(mask, 1, philox.threshold(p), seed, isa=isa)
    assert torch.equal(mask, by_torch(philox.keep_mask, *shape, p, seed, CPU))
    assert torch.equal(mask, philox.keep_mask(*shape, p, seed, CPU))


@needs_module
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.37, 0.9])
def test_both_ways_give_the_same_factors(dtype, p, by_torch, isa, threads):
    like = torch.empty(0, dtype=dtype)
    expected = by_torch(philox.dropout_factor, 33, 127, p, 9, like)
    found = torch.empty(33, 127, dtype=dtype)
    native.fill_dropout(found, philox._kept_bits(p, dtype), philox.threshold(p), 9, isa=isa)
    assert torch.equal(found, expected)
    chosen = philox.dropout_factor(33, 127, p, 9, like)
    assert chosen.dtype == expected.dtype == dtype and torch.equal(chosen, expected)


@needs_module
@pytest.mark.parametrize("first_group", [2**32 - 3, 2**32, 2**40 + 1])
def test_elements_past_32_bits(first_group, isa):
    found = torch.empty(1, 64, dtype=torch.bool)
    native.fill_dropout(found, 1, philox.threshold(0.5), 11, first_group, isa)
    counter = first_group + torch.arange(16)
    words = torch.stack(philox.philox4x32(counter & 0xFFFFFFFF, counter >> 32, 11), dim=-1)
    assert torch.equal(found[0], words.flatten() >= philox.threshold(0.5))


@needs_module
def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(
        RuntimeError, match=r"instruction set: expected one that .*baseline.*, got 'mmx'"
    ):
        native.fill_dropout(torch.empty(1, 4), 1, 0, 0, isa="mmx")


def test_tracers_see_ordinary_operations():
    with torch._subclasses.FakeTensorMode():
        fake = philox.dropout_factor(3, 5, 0.5, 1, torch.empty(1))
    assert isinstance(fake, torch._subclasses.FakeTensor)
    assert philox.keep_mask(3, 5, 0.5, 1, torch.device("meta")).is_meta


def test_compiled_code_drops_the_same_elements():
    def drop(x):
        return x * philox.dropout_factor(x.shape[0], x.shape[1], 0.4, 3, x)

    x = torch.randn(6, 10)
    assert torch.equal(torch.compile(drop, backend="eager", fullgraph=True)(x), drop(x))
