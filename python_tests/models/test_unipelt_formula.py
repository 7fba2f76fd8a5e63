"""UniPELT and free combinations in a BERT against a transcription of their formulas.

The transcription is written from the paper and the official structure and shares no code with the
package: plain torch, the prefix expanded to the batch and concatenated to the keys, the mask dense,
the gates averaged as written. float64, outputs and every gradient to 1e-10.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from pelt_kernels.methods import (
    BitFitConfig,
    BottleneckAdapterConfig,
    CompositeConfig,
    LoraConfig,
    PrefixTuningConfig,
    UniPELTConfig,
    parts_of,
)
from pelt_kernels.models import get_pelt_model

HEADS = 4
LAYERS = 2


def sentence_gate(x, weight, bias, mask, pooling):
    """sigmoid first, then the mean over the tokens of a sentence."""
    token = torch.sigmoid((x * weight).sum(-1) + bias)
    if pooling == "mean":
        return token.mean(1)
    return (token * mask).sum(1) / mask.sum(1)


def split_heads(x):
    batch, length, width = x.shape
    return x.view(batch, length, HEADS, width // HEADS).permute(0, 2, 1, 3)


def prefix_keys_values(p, batch):
    """E -> Linear -> tanh -> Linear(mid, 2Ld) -> (2L, B, H, P, d/H); layer i: chunks 2i, 2i + 1."""
    up_weight = torch.cat([p[f"prefix.up_weight.{i}"] for i in range(LAYERS)])
    up_bias = torch.cat([p[f"prefix.up_bias.{i}"] for i in range(LAYERS)])
    embedded = p["prefix.embedding.weight"].expand(batch, -1, -1)
    hidden = torch.tanh(F.linear(embedded, p["prefix.down.weight"], p["prefix.down.bias"]))
    flat = F.linear(hidden, up_weight, up_bias)
    length, width = embedded.shape[1:]
    return flat.view(batch, length, 2 * LAYERS, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)


def transcription(p, ids, mask, config, eps):
    """Logits [B, 3] of BertForSequenceClassification with the parts of a config, from parameters by
    name.
    """
    config = parts_of(config)
    batch, length = ids.shape
    bert = "base_model.bert."
    embedded = (
        p[bert + "embeddings.word_embeddings.weight"][ids]
        + p[bert + "embeddings.position_embeddings.weight"][:length]
        + p[bert + "embeddings.token_type_embeddings.weight"][0]
    )

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], p[name + ".weight"], p[name + ".bias"], eps)

    def linear(x, name):
        return x @ p[name + ".weight"].T + p[name + ".bias"]

    h = norm(embedded, bert + "embeddings.LayerNorm")
    width = h.shape[-1]
    hidden_keys = (1.0 - mask.double())[:, None, None, :] * -1e300

    def lora(h, name, target):
        y = linear(h, name)
        if config.lora is None or target not in config.lora.targets:
            return y
        delta = (h @ p[name + ".lora_a"].T) @ p[name + ".lora_b"].T
        if not config.lora.gated:
            return y + config.lora.alpha / config.lora.r * delta
        pooling = config.lora.gate_pooling
        g = sentence_gate(h, p[name + ".gate.weight"], p[name + ".gate.bias"], mask, pooling)
        return y + g[:, None, None] * delta

    for i in range(LAYERS):
        layer = f"{bert}encoder.layer.{i}."
        attention = layer + "attention.self."
        q = split_heads(lora(h, attention + "query", "query"))
        k = split_heads(lora(h, attention + "key", "key"))
        v = split_heads(lora(h, attention + "value", "value"))
        bias = hidden_keys
        if config.prefix is not None:
            keys_values = prefix_keys_values(p, batch)
            prefix_k, prefix_v = keys_values[2 * i], keys_values[2 * i + 1]
            if config.prefix.gated:
                name = attention + "query.extra_gates.prefix."
                pooling = config.prefix.gate_pooling
                g = sentence_gate(h, p[name + "weight"], p[name + "bias"], mask, pooling)
                prefix_k, prefix_v = (
                    g[:, None, None, None] * prefix_k,
                    g[:, None, None, None] * prefix_v,
                )
            k, v = torch.cat([prefix_k, k], 2), torch.cat([prefix_v, v], 2)
            bias = F.pad(hidden_keys, (prefix_k.shape[2], 0))
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(width // HEADS) + bias, -1)
        context = (weights @ v).permute(0, 2, 1, 3).reshape(batch, length, width)
        a = norm(
            lora(context, layer + "attention.output.dense", "attention_output") + h,
            layer + "attention.output.LayerNorm",
        )
        f = F.gelu(lora(a, layer + "intermediate.dense", "ffn_in"))
        f = lora(f, layer + "output.dense", "ffn_out")
        ln = layer + "output.LayerNorm"
        h = norm(f + a, ln)
        if config.adapter is not None:
            # The sequential one reads the layer's output, the parallel one what the FFN reads.
            z = {"sequential": h, "parallel": a}[config.adapter.placement]
            adapter = ln + ".adapter."
            u = torch.relu(z @ p[adapter + "w_down"].T + p[adapter + "b_down"])
            u = u @ p[adapter + "w_up"].T + p[adapter + "b_up"]
            if config.adapter.gated:
                name, pooling = adapter + "gate.", config.adapter.gate_pooling
                g = sentence_gate(z, p[name + "weight"], p[name + "bias"], mask, pooling)
                u = g[:, None, None] * u
            h = norm(config.adapter.scale * u + f + a, ln)
    pooled = torch.tanh(linear(h[:, 0], bert + "pooler.dense"))
    return linear(pooled, "base_model.classifier")


def unipelt(gated=(True, True, True), pooling="masked_mean", parts="apl"):
    return UniPELTConfig(
        adapter=BottleneckAdapterConfig(bottleneck=5, gated=gated[0]) if "a" in parts else None,
        prefix=PrefixTuningConfig(prefix_length=3, mid=7, gated=gated[1]) if "p" in parts else None,
        lora=LoraConfig(r=4, alpha=6, gated=gated[2]) if "l" in parts else None,
        gate_pooling=pooling,
    )


def parallel(**options):
    return BottleneckAdapterConfig(bottleneck=5, placement="parallel", scale=4.0, **options)


CASES = {
    "apl-masked_mean": unipelt(),
    "apl-mean": unipelt(pooling="mean"),
    "apl-nogate": unipelt(gated=(False, False, False)),
    "apl-adapter-gate": unipelt(gated=(True, False, False)),
    "apl-prefix-gate": unipelt(gated=(False, True, False)),
    "apl-lora-gate": unipelt(gated=(False, False, True)),
    "ap": unipelt(parts="ap"),
    "al": unipelt(parts="al"),
    "pl": unipelt(parts="pl", pooling="mean"),
    "a": unipelt(parts="a"),
    "p": unipelt(parts="p"),
    "l": unipelt(parts="l"),
    "parallel": parallel(),
    "parallel-gate": parallel(gated=True, gate_pooling="mean"),
    "sequential-scale": BottleneckAdapterConfig(bottleneck=5, scale=-2.0, activation="relu"),
    "mam": CompositeConfig.mam(
        adapter=parallel(), prefix=PrefixTuningConfig(prefix_length=4, mid=6)
    ),
    "bitfit": BitFitConfig(),
    "everything": CompositeConfig(
        adapter=parallel(gated=True),
        prefix=PrefixTuningConfig(prefix_length=3, mid=7, gated=True, gate_pooling="mean"),
        lora=LoraConfig(r=4, targets=("key", "attention_output", "ffn_in", "ffn_out")),
        bitfit=True,
    ),
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients_are_the_formulas(case, attention, make_base, make_batch, randomise):
    config = CASES[case]
    base = make_base(dtype=torch.float64, attention=attention)
    model = randomise(get_pelt_model(base, config))
    batch = make_batch()
    out = model(**batch)
    trained = model.trained_parameters()
    out.loss.backward()

    leaves = {
        name: parameter.detach().clone().requires_grad_(name in trained)
        for name, parameter in model.named_parameters()
    }
    eps = base.config.layer_norm_eps
    logits = transcription(leaves, batch["input_ids"], batch["attention_mask"], config, eps)
    F.cross_entropy(logits, batch["labels"]).backward()

    torch.testing.assert_close(out.logits, logits, rtol=0, atol=1e-10)
    assert logits.abs().max() > 0.01
    for name, parameter in trained.items():
        assert leaves[name].grad.abs().max() > 0, (
            f"{name} has no gradient, so it would not be compared"
        )
        torch.testing.assert_close(
            parameter.grad,
            leaves[name].grad,
            rtol=0,
            atol=1e-10,
            msg=lambda m, name=name: f"{name}: {m}",
        )


def test_a_ten_thousandth_in_any_trained_tensor_would_be_noticed(make_base, make_batch, randomise):
    """The ruler itself: no tensor is compared through something that hides it."""
    model = randomise(get_pelt_model(make_base(dtype=torch.float64), unipelt()))
    ids, mask = (make_batch()[name] for name in ("input_ids", "attention_mask"))
    p = {name: parameter.detach() for name, parameter in model.named_parameters()}
    right = transcription(p, ids, mask, unipelt(), 1e-12)
    for name in model.trained_parameters():
        changed = p[name].clone()
        changed.flatten()[0] += 1e-4
        wrong = transcription(p | {name: changed}, ids, mask, unipelt(), 1e-12)
        assert (right - wrong).abs().max() > 1e-10, name
