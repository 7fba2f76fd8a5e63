"""HyperPELT's hypernetworks against a transcription of their formulas, sample by sample, in float64:
what they write, what an adapter and an attention make of it, and every gradient.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from pelt_kernels.nn import (
    GeneratedWeights,
    HyperCall,
    HyperNetwork,
    StackSizes,
    TaskEmbeddings,
    generated_adapter,
)
from pelt_kernels.ops import Prefix, prefix_attention

TASKS, FEATURES, CELLS = 3, 5, 4
Z, MID, I = 3, 4, 5  # noqa: E741  (the paper's letter)
P, R = 2, 3
SIZES = {"encoder": StackSizes(2, 6, 1, 2, 2), "decoder": StackSizes(1, 6, 2, 2, 2)}


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)


def make(features=None, scale=None, **sizes):
    """Weights of both stacks in float64; with a scale every parameter is drawn anew."""
    sizes = {"prefix_length": P, "bottleneck": R, **sizes}
    options = {"embedding_size": Z, "mid": MID, "dtype": torch.float64}
    weights = GeneratedWeights(
        TaskEmbeddings(TASKS, sizes["prefix_length"], features=features, **options),
        {name: HyperNetwork(stack, size=I, **sizes, **options) for name, stack in SIZES.items()},
    )
    if scale is not None:
        for parameter in weights.parameters():
            nn.init.normal_(parameter, std=scale)
    return weights


def linear(p, name, x):
    return p[name + ".weight"] @ x + p[name + ".bias"]


def layer_norm(x, weight, bias):
    mean = x.sum() / len(x)
    variance = ((x - mean) ** 2).sum() / len(x)
    return (x - mean) / torch.sqrt(variance + 1e-6) * weight + bias


def hyper_embedding(p, z, layer, block):
    """Linear -> ReLU -> Linear -> LayerNorm of [z; l; b]."""
    name = "controller."
    hidden = torch.clamp(linear(p, name + "down", torch.cat([z, layer, block])), min=0)
    embedding = linear(p, name + "up", hidden)
    return layer_norm(embedding, p[name + "norm.weight"], p[name + "norm.bias"])


def task_part(p, task, image):
    """z [1 + P, Z] of a sample: its task's, and its image's part."""
    z = torch.cat([p["tasks.adapter"][task][None], p["tasks.prefix"][task]])
    if image is None:
        return z
    pooled = image.sum(0) / len(image)
    hidden = torch.clamp(linear(p, "tasks.from_image.0", pooled), min=0)
    return z + linear(p, "tasks.from_image.2", hidden).view(1 + P, Z)


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def adapter_of_a_row(p, layer, z, x):
    """λ LN( W_up GeLU( W_down x + b_d ) + b_u ) with everything from I."""
    i = hyper_embedding(p, z[0], p["layer_embedding"][layer], p["ffn_embedding"])
    d = len(x)
    w_down, w_up = linear(p, "w_down", i).view(R, d), linear(p, "w_up", i).view(d, R)
    u = w_up @ gelu_tanh(w_down @ x + linear(p, "b_down", i)) + linear(p, "b_up", i)
    normed = layer_norm(u, linear(p, "norm_weight", i), linear(p, "norm_bias", i))
    return p["scale"][layer] * normed


def attention_of_a_sample(p, layer, block, z, q, k, v):
    """softmax( Q [Pk; K]ᵀ / sqrt(E) ) [Pv; V] with q, k, v [H, S, E]."""
    keys, values = [], []
    for position in range(P):
        i = hyper_embedding(
            p,
            z[1 + position],
            p["prefix_layer_embedding"][layer][position],
            p["attention_embedding"][block][position],
        )
        keys.append(linear(p, "keys", i).view(len(k), -1))
        values.append(linear(p, "values", i).view(len(k), -1))
    k, v = torch.cat([torch.stack(keys, 1), k], 1), torch.cat([torch.stack(values, 1), v], 1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return torch.softmax(scores, -1) @ v


def parameters_of(weights, stack):
    p = {n: v for n, v in weights.named_parameters() if n.startswith("tasks.")}
    start = f"stacks.{stack}."
    return p | {
        n.removeprefix(start): v for n, v in weights.named_parameters() if n.startswith(start)
    }


def transcription(weights, x, residual, qkv, tasks, images):
    outputs = []
    for stack, sizes in SIZES.items():
        p = parameters_of(weights, stack)
        for b, task in enumerate(tasks):
            z = task_part(p, task, None if images is None else images[b])
            for layer in range(sizes.num_layers):
                rows = [adapter_of_a_row(p, layer, z, row) for row in x[b]]
                outputs.append(torch.stack(rows) + residual[b])
                for block in range(sizes.attention_blocks):
                    q, k, v = (part[b] for part in qkv)
                    outputs.append(attention_of_a_sample(p, layer, block, z, q, k, v))
    return torch.cat([output.flatten() for output in outputs])


def computed(weights, x, residual, qkv, tasks, images):
    """The same in the same order by the modules, a batch at once."""
    call = HyperCall.of(torch.tensor(tasks), images)
    outputs = []
    for stack, sizes in SIZES.items():
        by_step = []
        for layer in range(sizes.num_layers):
            adapter, index = weights.adapter(stack, layer, call)
            by_step.append(generated_adapter(x, adapter, index, residual=residual))
            for block in range(sizes.attention_blocks):
                (keys, values), index = weights.prefix(stack, layer, block, call)
                by_step.append(prefix_attention(*qkv, [Prefix(keys, values, index)]))
        outputs += [step[b].flatten() for b in range(len(tasks)) for step in by_step]
    return torch.cat(outputs)


def inputs(batch):
    x, residual = torch.randn(2, batch, 2, 6, dtype=torch.float64).unbind()
    qkv = torch.randn(3, batch, 2, 3, 2, dtype=torch.float64).unbind()
    return x, residual, qkv, torch.randn(batch, CELLS, FEATURES, dtype=torch.float64)


@pytest.mark.parametrize("has_images", [False, True])
def test_what_is_written_is_the_formula(has_images):
    weights = make(FEATURES if has_images else None, scale=0.8)
    x, residual, qkv, images = inputs(4)
    images = images.requires_grad_() if has_images else None
    x.requires_grad_()
    given = (x, residual, qkv, [2, 0, 2, 1], images)
    leaves = [x, *weights.parameters(), *([images] if has_images else [])]
    results = []
    for function in (computed, transcription):
        out = function(weights, *given)
        factors = torch.linspace(-1, 1, len(out), dtype=out.dtype)
        results.append((out, torch.autograd.grad((out * factors).sum(), leaves)))
    (out, grads), (truth, true_grads) = results
    torch.testing.assert_close(out, truth, rtol=1e-11, atol=1e-11)
    for grad, true_grad in zip(grads, true_grads, strict=True):
        assert true_grad.any()
        torch.testing.assert_close(grad, true_grad, rtol=1e-9, atol=1e-9)


def test_a_batch_is_written_once_for_each_task():
    weights = make()
    call = HyperCall.of(torch.tensor([2, 0, 2, 2]))
    assert call.entries.tolist() == [0, 2] and call.index.tolist() == [1, 0, 1, 1]
    adapter, index = weights.adapter("encoder", 1, call)
    assert adapter.w_down.shape == (2, R, 6) and index is call.index
    prefix, _ = weights.prefix("decoder", 0, 1, call)
    assert prefix.keys.shape == (2, P, 2, 2)


def test_starts_are_the_papers():
    network = HyperNetwork(SIZES["encoder"], prefix_length=40, bottleneck=4)
    weights = GeneratedWeights(TaskEmbeddings(50, 40), {"e": network})
    for name, parameter in network.named_parameters():
        if name.endswith(".bias"):
            assert not parameter.any(), name
        elif name in ("scale", "controller.norm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith(".weight"):
            assert abs(parameter.std() - 0.01) < 0.002, name
    for embedding in (weights.tasks.adapter, weights.tasks.prefix, network.prefix_layer_embedding):
        assert abs(embedding.std() - 1) < 0.05
    assert network.controller.norm.eps == 1e-6
    x = torch.randn(2, 3, 6)
    adapter, index = weights.adapter("e", 0, HyperCall.of(torch.tensor([3, 7])))
    y = generated_adapter(x, adapter, index)
    assert y.any() and y.abs().max() < 1  # the LayerNorm's weight comes without + 1


def test_stored_weights_are_the_generated_ones():
    weights = make(scale=0.8)
    x, residual, qkv, _ = inputs(2)
    truth = computed(weights, x, residual, qkv, [1, 1], None)
    stored = weights.stored(1)
    found = computed(stored, x, residual, qkv, [0, 0], None)
    torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)
    names = {n.rpartition(".")[2] for n, _ in stored.named_parameters()}
    assert names == {
        "w_down", "b_down", "w_up", "b_up", "norm_weight", "norm_bias", "scale", "keys", "values",
    }  # fmt: skip


@pytest.mark.parametrize("sizes", [{"prefix_length": 0}, {"bottleneck": 0}])
def test_either_part_may_be_left_out(sizes):
    weights = make(**sizes)
    stored = weights.stored(0)
    names = {n.partition(".")[2].partition(".")[2] for n, _ in stored.named_parameters()}
    assert names == ({"keys", "values"} if "bottleneck" in sizes else names - {"keys", "values"})
    with pytest.raises(ValueError, match="prefix_length or bottleneck >= 1"):
        make(prefix_length=0, bottleneck=0)


def test_weights_are_kept_while_that_is_asked_for():
    weights = make(scale=0.5).eval()
    call = HyperCall.of(torch.tensor([2, 0, 2]))

    def asked():
        adapter, index = weights.adapter("encoder", 0, call)
        return adapter.w_down, index

    with torch.no_grad():
        written = asked()[0]
        assert asked()[0] is not written
        with weights.keeping():
            kept, index = asked()
            assert kept.shape[0] == TASKS and index.tolist() == [2, 0, 2]
            torch.testing.assert_close(kept[index], written[call.index], rtol=1e-12, atol=1e-12)
            assert asked()[0] is kept
            assert copy.deepcopy(weights)._kept is None
        weights.tasks.adapter.data.mul_(2)
        assert not torch.equal(asked()[0], written)
    with weights.keeping():
        assert asked()[0].requires_grad
