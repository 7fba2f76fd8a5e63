"""PrefixAttention with attributes (Control Prefixes), with fewer heads of keys, and with a bias."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pelt_kernels.nn import PrefixAttention
from pelt_kernels.ops import prefix_attention

L, P, G, E, WIDTH, MID = 2, 3, 2, 4, 10, 6
ATTRIBUTES = {"source": (3, 2), "cat": (4, 1)}
LABELS = {"source": torch.tensor([2, 0, 1]), "cat": torch.tensor([3, 3, 0])}


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)


def make(mid=MID, dtype=torch.float64, **options):
    prefix = PrefixAttention(
        L, P, G, E, mid=mid, width=WIDTH, attributes=ATTRIBUTES, dtype=dtype, **options
    )
    for parameter in prefix.parameters():
        nn.init.normal_(parameter)
    return prefix


def test_the_parameters_are_those_of_the_paper():
    shapes = {name: tuple(p.shape) for name, p in make().named_parameters()}
    assert shapes == {
        "embedding.weight": (P, WIDTH),
        "embedding_source": (3 * 2, WIDTH),
        "embedding_cat": (4 * 1, WIDTH),
        "down.weight": (MID, WIDTH),
        "down.bias": (MID,),
        **{f"up_weight.{i}": (2 * G * E, MID) for i in range(L)},
        **{f"up_bias.{i}": (2 * G * E,) for i in range(L)},
    }
    shapes = {name: tuple(p.shape) for name, p in make(mid=None).named_parameters()}
    assert shapes == {
        "table": (L, 2, P, G, E),
        "table_source": (L, 2, 3, 2, G, E),
        "table_cat": (L, 2, 4, 1, G, E),
    }


def test_slice_then_mlp_is_mlp_then_slice_and_later_attributes_stand_in_front():
    """What a sentence's keys and values are, written as the paper does: its own rows of each
    embedding, [C_cat ; C_source ; P], through the one MLP.
    """
    prefix = make()
    up_weight, up_bias = torch.cat(list(prefix.up_weight)), torch.cat(list(prefix.up_bias))
    for b in range(3):
        source, cat = (int(LABELS[name][b]) for name in ("source", "cat"))
        rows = torch.cat(
            [
                prefix.embedding_cat[cat : cat + 1],
                prefix.embedding_source[2 * source : 2 * source + 2],
                prefix.embedding.weight,
            ]
        )
        out = torch.tanh(rows @ prefix.down.weight.T + prefix.down.bias) @ up_weight.T + up_bias
        chunks = out.view(1 + 2 + P, 2 * L, G, E).transpose(0, 1)
        for layer in range(L):
            segments = prefix.segments(layer, LABELS)
            assert [s.index is not None for s in segments] == [True, True, False]
            for side in (0, 1):
                found = torch.cat(
                    [s[side] if s.index is None else s[side][s.index[b]] for s in segments]
                )
                torch.testing.assert_close(found, chunks[2 * layer + side], rtol=0, atol=1e-13)


@pytest.mark.parametrize("mid", [MID, None])
@pytest.mark.parametrize("has_bias", [True, False])
def test_forward_and_weights_are_the_operator_on_the_segments(mid, has_bias):
    prefix = make(mid)
    q, k, v = torch.randn(3, 4, 5, E), torch.randn(3, G, 7, E), torch.randn(3, G, 7, E)
    q, k, v = q.double(), k.double(), v.double()
    bias = torch.randn(1, 4, 5, 7, dtype=torch.float64) if has_bias else None
    mask = torch.arange(7)[None] < torch.tensor([[7], [4], [1]])
    options = {"key_mask": mask, "bias": bias, "scale": 0.7}
    expected = prefix_attention(q, k, v, prefix.segments(1, LABELS), **options)
    assert torch.equal(prefix(1, q, k, v, labels=LABELS, **options), expected)
    weights = prefix.weights(1, q, k, labels=LABELS, **options)
    values = [s.v[None].expand(3, -1, -1, -1) if s.index is None else s.v[s.index]
              for s in prefix.segments(1, LABELS)]  # fmt: skip
    columns = torch.cat([*(part.transpose(1, 2) for part in values), v], 2).repeat_interleave(2, 1)
    torch.testing.assert_close(weights @ columns, expected, rtol=0, atol=1e-12)
    other = prefix(1, q, k, v, labels={**LABELS, "cat": torch.tensor([3, 3, 1])}, **options)
    assert torch.equal(other[:2], expected[:2]) and not torch.equal(other[2], expected[2])


def test_collapsing_keeps_the_numbers_of_every_label():
    prefix = make(dtype=torch.float32)
    before = [prefix.segments(layer, LABELS) for layer in range(L)]
    prefix.requires_grad_(False)
    prefix.collapse()
    assert set(prefix.state_dict()) == {"table", "table_source", "table_cat"}
    assert not any(p.requires_grad for p in prefix.parameters())
    for layer in range(L):
        for mine, first in zip(prefix.segments(layer, LABELS), before[layer], strict=True):
            assert torch.equal(mine.k, first.k) and torch.equal(mine.v, first.v)


@pytest.mark.parametrize("mid", [MID, None])
def test_unseen_labels_start_as_zeros_and_stay_so_without_sentences(mid):
    prefix = PrefixAttention(
        L, P, G, E, mid=mid, attributes=ATTRIBUTES, unseen={"source": (0, 2)}, dtype=torch.float64
    )
    for layer in range(L):
        _, source, _ = prefix.segments(layer, LABELS)
        for rows in (source.k, source.v):
            assert [bool(rows[label].any()) for label in range(3)] == [False, True, False]
    parameter = prefix.table_source if mid is None else prefix.embedding_source
    optimizer = torch.optim.AdamW(prefix.parameters(), lr=0.1)
    q, k, v = torch.randn(3, 1, G, 5, E, dtype=torch.float64).unbind()
    for _ in range(3):
        labels = {"source": torch.tensor([1]), "cat": torch.tensor([0])}
        optimizer.zero_grad()
        prefix(0, q, k, v, labels=labels).pow(2).sum().backward()
        assert parameter.grad.any()
        optimizer.step()
    rows = parameter.transpose(0, 2) if mid is None else parameter.view(3, 2, -1)
    assert not rows[[0, 2]].any() and rows[1].any()


@pytest.mark.parametrize("mid", [512, None])
def test_the_start_of_pytorch(mid):
    prefix = PrefixAttention(
        1, 64, 8, 32, mid=mid, attributes={"a": (16, 4)}, start="torch", width=256
    )
    for name, parameter in prefix.named_parameters():
        if name.startswith(("embedding", "table")):
            assert abs(parameter.std() - 1) < 0.03, name
        else:
            fan_in = 256 if name.startswith("down") else 512
            bound = 1 / math.sqrt(fan_in)
            assert 0.9 * bound < parameter.abs().max() <= bound, name
            assert abs(parameter.std() * math.sqrt(3) / bound - 1) < 0.15, name


def test_what_it_refuses():
    four = dict.fromkeys("abcd", (2, 1))
    with pytest.raises(ValueError, match=r"at most 3 attributes, got 4 \(a, b, c, d\)"):
        PrefixAttention(1, 1, 1, 1, attributes=four)
    with pytest.raises(ValueError, match=r"got 'a': \(0, 1\)"):
        PrefixAttention(1, 1, 1, 1, attributes={"a": (0, 1)})
    with pytest.raises(ValueError, match=r"the name an identifier, got 'a.b'"):
        PrefixAttention(1, 1, 1, 1, attributes={"a.b": (2, 1)})
    with pytest.raises(ValueError, match=r"unseen labels of 'a' among the 2 .*got \[2\]"):
        PrefixAttention(1, 1, 1, 1, attributes={"a": (2, 1)}, unseen={"a": (2,)})
    with pytest.raises(ValueError, match="unseen labels of 'b' among the 0"):
        PrefixAttention(1, 1, 1, 1, attributes={"a": (2, 1)}, unseen={"b": ()})
    with pytest.raises(ValueError, match="start to be one of normal, torch, got 'zeros'"):
        PrefixAttention(1, 1, 1, 1, start="zeros")
    with pytest.raises(ValueError, match="width >= 1 or None, got 0"):
        PrefixAttention(1, 1, 1, 1, width=0)
    with pytest.raises(ValueError, match=r"labels for the attributes source, cat, got none"):
        make().segments(0)
    with pytest.raises(ValueError, match=r"attributes source, cat, got cat"):
        make().segments(0, {"cat": LABELS["cat"]})
    with pytest.raises(ValueError, match=r"attributes \(none\), got cat"):
        PrefixAttention(1, 1, 1, 1).segments(0, {"cat": LABELS["cat"]})
