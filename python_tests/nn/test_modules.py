"""Modules: where their parameters start, and that their forward is the operator on them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pelt_kernels.nn import Gate, GatedAdapter, LoRALinear, PrefixAttention
from pelt_kernels.ops import (
    LearnedGate,
    LoraBranch,
    Prefix,
    gated_adapter,
    lora_linear,
    prefix_attention,
)


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)


def is_normal(value, std=0.02):
    """Within five standard errors of N(0, std)."""
    n = value.numel()
    assert abs(value.mean()) < 5 * std / math.sqrt(n)
    assert abs(value.std() / std - 1) < 5 / math.sqrt(2 * n)


def test_gates_start_at_one_half():
    gate = Gate(4096)
    is_normal(gate.weight)
    assert gate.weight.shape == (4096,) and torch.equal(gate.bias, torch.zeros(1))
    mask = torch.ones(2, 3, dtype=torch.bool)
    assert gate.learned(mask) == LearnedGate(gate.weight, gate.bias, "masked_mean")
    assert gate.learned(None).pooling == "mean"
    assert gate.mask_for(mask) is mask
    assert (
        Gate(8, "mean").mask_for(mask) is None and Gate(8, "token").learned(None).pooling == "token"
    )
    with pytest.raises(
        ValueError, match="pooling to be one of token, mean, masked_mean, got 'max'"
    ):
        Gate(8, "max")
    with pytest.raises(ValueError, match="hidden_size >= 1, got 0"):
        Gate(0)


def test_adapters_start_near_the_identity():
    adapter = GatedAdapter(256, 16, gate_pooling="mean")
    for weight in (adapter.w_down, adapter.w_up):
        is_normal(weight)
    assert adapter.w_down.shape == (16, 256) and adapter.w_up.shape == (256, 16)
    assert not adapter.b_down.any() and not adapter.b_up.any()
    x = torch.randn(2, 5, 256)
    y = adapter(x)
    assert not torch.equal(y, x) and (y - x).norm() < 0.1 * x.norm()


@pytest.mark.parametrize("pooling", [None, "mean", "masked_mean", "token"])
def test_an_adapter_is_the_operator_on_its_parameters(pooling):
    adapter = GatedAdapter(12, 5, activation="gelu", gate_pooling=pooling, dropout=0.3, scale=2.0)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    x, residual = torch.randn(2, 2, 6, 12).unbind()
    mask = torch.tensor([[True] * 6, [True] * 2 + [False] * 4])
    gate = adapter.gate and LearnedGate(adapter.gate.weight, adapter.gate.bias, pooling)
    for training in (False, True):
        adapter.train(training)
        torch.manual_seed(3)
        y, value = adapter(x, residual=residual, mask=mask, return_gate=True)
        torch.manual_seed(3)
        expected, expected_value = gated_adapter(
            x, adapter.w_down, adapter.w_up, b_down=adapter.b_down, b_up=adapter.b_up,
            activation="gelu", scale=2.0, gate=gate, mask=mask, residual=residual,
            dropout_p=0.3 if training else 0.0, return_gate=True,
        )  # fmt: skip
        assert torch.equal(y, expected)
        assert (value is None) == (pooling is None)
        assert value is None or torch.equal(value, expected_value)
    assert (y == residual).any() and not (y == residual).all()


@pytest.mark.parametrize("has_bias", [True, False])
def test_lora_stands_for_its_linear(has_bias):
    base = nn.Linear(64, 48, bias=has_bias)
    lora = LoRALinear(base, r=8, alpha=4)
    assert lora.weight is base.weight and lora.bias is base.bias
    assert set(base.state_dict()) <= set(lora.state_dict())
    bound = 1 / math.sqrt(64)
    assert lora.lora_a.abs().max() <= bound and lora.lora_a.abs().max() > 0.9 * bound
    assert abs(lora.lora_a.std() - bound / math.sqrt(3)) < 0.01
    assert not lora.lora_b.any()
    x = torch.randn(2, 5, 64)
    torch.testing.assert_close(lora(x), base(x), rtol=0, atol=1e-6)
    nn.init.normal_(lora.lora_b)
    y, gates = lora(x, return_gates=True)
    assert torch.equal(y, lora(x)) and gates == {}
    expected = base(x) + 0.5 * (x @ lora.lora_a.T) @ lora.lora_b.T
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)


def test_a_gate_replaces_alpha_and_extra_gates_come_out():
    base = nn.Linear(16, 12)
    lora = LoRALinear(
        base, r=4, alpha=1000, gate_pooling="masked_mean", extra_gates={"prefix": "mean"}
    )
    for parameter in (lora.lora_b, lora.gate.weight, lora.extra_gates["prefix"].weight):
        nn.init.normal_(parameter)
    x = torch.randn(3, 5, 16)
    mask = torch.arange(5)[None] < torch.tensor([5, 2, 3])[:, None]
    y, gates = lora(x, mask, return_gates=True)
    assert torch.equal(lora(x, mask), y)
    assert set(gates) == {"", "prefix"}
    token = torch.sigmoid(x @ lora.gate.weight + lora.gate.bias)
    own = (token * mask).sum(1) / mask.sum(1)
    extra = torch.sigmoid(x @ lora.extra_gates["prefix"].weight).mean(1)
    torch.testing.assert_close(gates[""], own)
    torch.testing.assert_close(gates["prefix"], extra)
    expected = base(x) + own[:, None, None] * ((x @ lora.lora_a.T) @ lora.lora_b.T)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    gates["prefix"].sum().backward()
    assert lora.extra_gates["prefix"].weight.grad.abs().max() > 0


def test_without_a_branch_only_the_extra_gates_are_left():
    base = nn.Linear(16, 12)
    lora = LoRALinear(base, r=0, gate_pooling="mean", extra_gates={"prefix": "mean"})
    assert {name for name, _ in lora.named_parameters()} == {
        "weight", "bias", "extra_gates.prefix.weight", "extra_gates.prefix.bias",
    }  # fmt: skip
    x = torch.randn(3, 5, 16)
    y, gates = lora(x, return_gates=True)
    assert set(gates) == {"prefix"} and torch.equal(y, lora_linear(x, base.weight, base.bias))


def test_lora_dropout_only_while_training():
    lora = LoRALinear(nn.Linear(16, 12), r=4, alpha=4, dropout=0.5)
    nn.init.normal_(lora.lora_b)
    x = torch.randn(3, 5, 16)
    assert torch.equal(lora.eval()(x), lora(x))
    lora.train()
    assert not torch.equal(lora(x), lora(x))
    torch.manual_seed(1)
    once = lora(x)
    torch.manual_seed(1)
    branch = LoraBranch(lora.lora_a, lora.lora_b)
    assert torch.equal(once, lora_linear(x, lora.weight, lora.bias, [branch], dropout_p=0.5))


@pytest.mark.parametrize("make", [lambda: nn.Linear(16, 12), lambda: Conv1D(12, 16)])
def test_lora_alone_in_a_sequence_trains_its_branch_only(make):
    base = make()
    layer = nn.Sequential(LoRALinear(base, r=4, alpha=4), nn.ReLU(), nn.Linear(12, 3))
    nn.init.normal_(layer[0].lora_b)
    x = torch.randn(2, 5, 16)
    expected = base(x) + (x @ layer[0].lora_a.T) @ layer[0].lora_b.T
    torch.testing.assert_close(layer[:1](x), expected, rtol=1e-5, atol=1e-5)
    layer(x).sum().backward()
    trained = {name for name, parameter in layer.named_parameters() if parameter.grad is not None}
    assert trained == {"0.lora_a", "0.lora_b", "2.weight", "2.bias"}
    assert not base.weight.requires_grad and not base.bias.requires_grad
    base.requires_grad_(True)
    assert LoRALinear(base, r=4, freeze=False).weight.requires_grad


def test_what_modules_refuse():
    with pytest.raises(TypeError, match="as an nn.Linear.*got Conv1d"):
        LoRALinear(nn.Conv1d(1, 1, 1))
    with pytest.raises(ValueError, match="r >= 0, got -1"):
        LoRALinear(nn.Linear(2, 2), r=-1)
    with pytest.raises(ValueError, match=r"dropout in \[0, 1\), got 1"):
        LoRALinear(nn.Linear(2, 2), dropout=1.0)
    with pytest.raises(ValueError, match="got 8 and 0"):
        GatedAdapter(8, 0)
    with pytest.raises(ValueError, match=r"dropout in \[0, 1\), got -0.1"):
        GatedAdapter(8, 2, dropout=-0.1)
    with pytest.raises(ValueError, match="got 2, 4, 8, None and -1"):
        PrefixAttention(2, -1, 4, 8, mid=None)
    with pytest.raises(ValueError, match="mid >= 1"):
        PrefixAttention(2, 1, 4, 8, mid=0)


def test_prefixes_come_from_one_reparametrisation():
    prefix = PrefixAttention(3, 10, 4, 16, mid=32)
    for name, parameter in prefix.named_parameters():
        if "bias" in name:
            assert not parameter.any(), name
            nn.init.normal_(parameter)
        else:
            is_normal(parameter)
            nn.init.normal_(parameter)
    up_weight, up_bias = torch.cat(list(prefix.up_weight)), torch.cat(list(prefix.up_bias))
    assert up_weight.shape == (2 * 3 * 64, 32)
    hidden = torch.tanh(prefix.down(prefix.embedding.weight))
    chunks = (hidden @ up_weight.T + up_bias).view(10, 6, 4, 16)
    for layer in range(3):
        keys, values = prefix.keys_values(layer)
        torch.testing.assert_close(keys, chunks[:, 2 * layer], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(values, chunks[:, 2 * layer + 1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mid", [None, 8])
def test_a_prefix_is_the_operator_on_its_keys_and_values(mid):
    prefix = PrefixAttention(2, 3, 4, 8, mid=mid)
    for parameter in prefix.parameters():
        nn.init.normal_(parameter)
    q, k, v = torch.randn(3, 2, 5, 4, 8).transpose(2, 3).unbind()
    gate, mask = torch.rand(2), torch.arange(5)[None] < torch.tensor([[5], [2]])
    keys, values = prefix.keys_values(1)
    expected = prefix_attention(
        q, k, v, [Prefix(keys, values)], gate=gate, key_mask=mask, scale=0.3
    )
    assert torch.equal(prefix(1, q, k, v, gate=gate, key_mask=mask, scale=0.3), expected)
    assert not torch.equal(prefix(0, q, k, v, gate=gate, key_mask=mask, scale=0.3), expected)


def test_collapsing_keeps_the_numbers_even_under_autocast():
    prefix = PrefixAttention(2, 3, 4, 8, mid=16)
    before = [torch.stack(prefix.keys_values(layer)) for layer in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.stack(prefix.keys_values(0))
    assert torch.equal(inside, before[0])
    prefix.requires_grad_(False)
    assert torch.equal(prefix.as_tables()["table"], torch.stack(before)) and not prefix.is_collapsed
    prefix.collapse()
    prefix.collapse()
    assert prefix.is_collapsed and not prefix.table.requires_grad
    assert set(prefix.state_dict()) == {"table"} and prefix.table.shape == (2, 2, 3, 4, 8)
    assert torch.equal(torch.stack(prefix.keys_values(1)), before[1])
    is_normal(PrefixAttention(4, 16, 4, 16, mid=None).table)
