"""T5 with Control Prefixes written out from its weights, in float64: relative positions belong to
the tokens of self-attention alone, prefixes of all three kinds stand in front and are always seen.
"""

from __future__ import annotations

import math

import pytest
import torch
from language_models import make_language_model, make_pairs

from pelt_kernels.methods import ControlPrefixesConfig
from pelt_kernels.models import get_pelt_model
from pelt_kernels.nn import PrefixAttention

H, E, D, P = 4, 16, 32, 3
ATTRIBUTES = {"source": torch.tensor([2, 0, 1]), "cat": torch.tensor([3, 3, 0])}
LENGTHS = {"source": 2, "cat": 1}
CONTROL = ControlPrefixesConfig(
    prefix_length=P, mid=8, attributes={"source": 3, "cat": 4}, lengths={"cat": 1}
)


def norm(x, weight):
    """T5's, whose mean of squares is in float32 always."""
    return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def position_bias(table, s, n, is_bidirectional, buckets=32, furthest=128):
    """[1, H, S, N] by T5's buckets: near distances have one each, further ones share."""
    distance = torch.arange(n)[None] - torch.arange(s)[:, None]
    first = torch.zeros_like(distance)
    if is_bidirectional:
        buckets //= 2
        first, distance = (distance > 0) * buckets, distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    far = (
        exact
        + (
            torch.log(distance.clamp(min=1).float() / exact)
            / math.log(furthest / exact)
            * (buckets - exact)
        ).long()
    )
    bucket = first + torch.where(distance < exact, distance, far.clamp(max=buckets - 1))
    return table[bucket].permute(2, 0, 1)[None]


def prefix_of(p, site, layer, batch):
    """[C_cat ; C_source ; P] of each sentence: its own rows of each embedding through one MLP."""
    start = f"prefix.{site}."
    out = []
    for b in range(batch):
        rows = [p[start + "embedding.weight"]]
        for name, length in LENGTHS.items():
            y = int(ATTRIBUTES[name][b])
            rows.insert(0, p[start + f"embedding_{name}"][y * length : (y + 1) * length])
        hidden = torch.tanh(torch.cat(rows) @ p[start + "down.weight"].T + p[start + "down.bias"])
        out.append(hidden @ p[f"{start}up_weight.{layer}"].T + p[f"{start}up_bias.{layer}"])
    return torch.stack(out).view(batch, -1, 2, H, E).permute(2, 0, 3, 1, 4)


def attention(p, name, x, keys, site, layer, bias, hidden):
    """bias [1, H, S, N] and hidden [B, 1, S, N] are of the tokens; prefix columns have zeros."""
    batch = len(x)
    heads = {
        part: (source @ p[f"{name}.{part}.weight"].T).view(batch, -1, H, E).transpose(1, 2)
        for part, source in (("q", x), ("k", keys), ("v", keys))
    }
    prefix_k, prefix_v = prefix_of(p, site, layer, batch)
    k, v = torch.cat([prefix_k, heads["k"]], 2), torch.cat([prefix_v, heads["v"]], 2)
    columns = prefix_k.shape[2]
    scores = heads["q"] @ k.transpose(2, 3)
    if bias is not None:
        scores = scores + torch.nn.functional.pad(bias, (columns, 0))
    scores = scores.masked_fill(torch.nn.functional.pad(hidden, (columns, 0)), -math.inf)
    out = torch.softmax(scores, -1) @ v
    return out.transpose(1, 2).reshape(batch, -1, H * E) @ p[f"{name}.o.weight"].T


def feed_forward(p, name, x):
    y = norm(x, p[f"{name}.layer_norm.weight"]) @ p[f"{name}.DenseReluDense.wi.weight"].T
    return x + y.relu() @ p[f"{name}.DenseReluDense.wo.weight"].T


def written_out(p, batch):
    base = "base_model."
    words = p[base + "shared.weight"]
    padding = ~batch["attention_mask"].bool()[:, None, None]
    x, n = words[batch["input_ids"]], batch["input_ids"].shape[1]
    first = base + "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    bias = position_bias(p[first], n, n, is_bidirectional=True)
    for layer in range(2):
        name = f"{base}encoder.block.{layer}.layer"
        z = norm(x, p[f"{name}.0.layer_norm.weight"])
        x = x + attention(p, f"{name}.0.SelfAttention", z, z, "encoder", layer, bias, padding)
        x = feed_forward(p, f"{name}.1", x)
    memory = norm(x, p[base + "encoder.final_layer_norm.weight"])
    labels = batch["labels"]
    inputs = torch.cat(
        [torch.ones_like(labels[:, :1]), labels[:, :-1]], 1
    )  # it starts with the padding
    y, s = words[inputs], inputs.shape[1]
    first = base + "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    bias = position_bias(p[first], s, s, is_bidirectional=False)
    later = torch.ones(s, s, dtype=torch.bool).triu(1)[None, None]
    for layer in range(2):
        name = f"{base}decoder.block.{layer}.layer"
        z = norm(y, p[f"{name}.0.layer_norm.weight"])
        y = y + attention(p, f"{name}.0.SelfAttention", z, z, "decoder", layer, bias, later)
        z = norm(y, p[f"{name}.1.layer_norm.weight"])
        cross = f"{name}.1.EncDecAttention"
        y = y + attention(p, cross, z, memory, "cross", layer, None, padding)
        y = feed_forward(p, f"{name}.2", y)
    return norm(y, p[base + "decoder.final_layer_norm.weight"]) * D**-0.5 @ words.T


@pytest.fixture
def model(randomise):
    return randomise(get_pelt_model(make_language_model("t5", torch.float64), CONTROL))


def test_logits_and_gradients_are_those_of_the_formula(model):
    batch = make_pairs("t5")
    p = {name: parameter.detach() for name, parameter in model.named_parameters()}
    trained = {n: p[n].clone().requires_grad_() for n in model.trained_parameters()}
    expected = written_out(p | trained, batch)
    out = model(**batch, attributes=ATTRIBUTES)
    torch.testing.assert_close(out.logits, expected, rtol=0, atol=1e-10)
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), batch["labels"].flatten())
    torch.testing.assert_close(out.loss, loss, rtol=0, atol=1e-10)
    out.loss.backward()
    loss.backward()
    for name, parameter in model.trained_parameters().items():
        truth = trained[name].grad
        assert truth.any(), name
        torch.testing.assert_close(parameter.grad, truth, rtol=0, atol=1e-10, msg=name)


def test_cross_attention_has_no_position_bias_and_prefixes_none_anywhere(model, monkeypatch):
    """What the operator is given: a bias of the tokens alone, over an encoder none or zeros."""
    given = {}
    forward = PrefixAttention.forward

    def watched(prefixes, layer, q, k, v, *, bias=None, **more):
        site = next(name for name, module in model.prefix.items() if module is prefixes)
        given.setdefault(site, []).append((bias, k.shape[2]))
        return forward(prefixes, layer, q, k, v, bias=bias, **more)

    monkeypatch.setattr(PrefixAttention, "forward", watched)
    model(**make_pairs("t5"), attributes=ATTRIBUTES)
    assert {site: len(calls) for site, calls in given.items()} == dict.fromkeys(
        ("encoder", "decoder", "cross"), 2
    )
    assert all(bias is None or not bias.any() for bias, _ in given["cross"])
    for site in ("encoder", "decoder"):
        assert all(bias.any() and bias.shape[-1] == keys for bias, keys in given[site])
