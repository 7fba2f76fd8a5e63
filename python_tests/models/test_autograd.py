"""Every method under what autograd promises: a gradient's gradient, forward mode, the transforms of
torch.func, per-sample gradients and traces.
"""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from closeness import assert_close
from every_method import METHODS
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from pelt_kernels.methods import LoraConfig
from pelt_kernels.models import get_pelt_model

SEED = 7  # of the directions
EVERY = pytest.mark.parametrize("method", METHODS)


@pytest.fixture
def make_model(make_base, randomise):
    """method, attention -> a model in evaluation whose parts all matter, and what it trains."""

    def make(method, attention="eager", **options):
        config = METHODS[method] if isinstance(method, str) else method
        model = randomise(get_pelt_model(make_base(attention=attention, **options), config)).eval()
        model.set_progress(1.0)
        trained = {id(p) for p in model.trained_parameters().values()}
        weights = {n: p.detach() for n, p in model.named_parameters() if id(p) in trained}
        return model, weights

    return make


def loss_of(model, batch):
    """The loss as a function of the weights."""
    return lambda weights: functional_call(model, weights, (), batch).loss


def logits_of(model, batch):
    return lambda weights: functional_call(model, weights, (), batch).logits


def by_two_backward_passes(function, weights, seed=SEED):
    """A function's derivative along `directions`: the gradient is linear in its direction."""

    def of_values(*values):
        return function(dict(zip(weights, values, strict=True)))

    given = tuple(weights.values()), tuple(directions(weights, seed).values())
    return torch.autograd.functional.jvp(of_values, *given)[1]


def vector(values):
    return torch.cat([value.detach().flatten() for value in values])


def in_double(model, weights):
    return model.double(), {name: weight.double() for name, weight in weights.items()}


def directions(weights, seed=SEED):
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(w.shape, generator=generator).to(w) for n, w in weights.items()}


def by_backward(loss, weights):
    """The gradient, and its own derivative along `directions`, by two backward passes."""
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
    every = list(leaves.values())
    grads = torch.autograd.grad(loss(leaves), every, create_graph=True, materialize_grads=True)
    along = sum((g * d).sum() for g, d in zip(grads, directions(weights).values(), strict=True))
    second = torch.autograd.grad(along, every, materialize_grads=True)
    return vector(grads), vector(second)


def by_transforms(loss, weights, seed=SEED):
    """The same two by torch.func: forward over reverse."""
    first, second = jvp(grad(loss), (weights,), (directions(weights, seed),))
    return vector(first.values()), vector(second.values())


def along_others(derivative, truth, size):
    """Derivatives along other directions, in float32 and in float64, each direction as long as makes
    the largest value `size`: a derivative is linear in its direction.
    """
    for seed in range(SEED + 1, SEED + 6):
        exact = truth(seed)
        scale = size / exact.abs().max().item()
        yield derivative(seed) * scale, exact * scale


@EVERY
def test_both_orders_both_ways(method, make_model, make_batch):
    model, weights = make_model(method)
    loss, logits = loss_of(model, make_batch()), logits_of(model, make_batch())
    backward, transforms = by_backward(loss, weights), by_transforms(loss, weights)
    tangent = jvp(logits, (weights,), (directions(weights),))[1]
    twice_back = by_two_backward_passes(logits, weights)
    exact_model, doubled = in_double(copy.deepcopy(model), weights)
    exact_loss = loss_of(exact_model, make_batch())
    exact_logits = logits_of(exact_model, make_batch())
    truth = by_transforms(exact_loss, doubled)
    what = f"{method}, order"
    assert_close(backward[0], transforms[0], truth[0], torch.float32, f"{what} 1")
    # An error is that of few large values, by chance small in one direction.
    others = along_others(
        lambda seed: by_transforms(loss, weights, seed)[1],
        lambda seed: by_transforms(exact_loss, doubled, seed)[1],
        truth[1].abs().max().item(),
    )
    assert_close(backward[1], transforms[1], truth[1], torch.float32, f"{what} 2", others)
    exact = by_two_backward_passes(exact_logits, doubled)
    others = along_others(
        lambda seed: by_two_backward_passes(logits, weights, seed),
        lambda seed: by_two_backward_passes(exact_logits, doubled, seed),
        exact.abs().max().item(),
    )
    assert_close(tangent, twice_back, exact, torch.float32, f"{method}, tangent", others)


# A trace holds the tasks of the batch that it was made of.
@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("vlm", "hyperpelt")])
def test_a_trace_is_the_model(method, make_model, make_batch):
    model, _ = make_model(method, "sdpa")

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids, mask):
            return self.model(input_ids=ids, attention_mask=mask).logits

    def given(**sizes):
        batch = make_batch(with_labels=False, **sizes)
        return batch["input_ids"], batch["attention_mask"]

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # transformers reads sizes as numbers
        traced = torch.jit.trace(Logits(), given())
        for sizes in ({}, {"lengths": (5, 9, 2, 6)}, {"lengths": (6, 3)}):
            found, expected = traced(*given(**sizes)), Logits()(*given(**sizes))
            model.double()
            truth = Logits()(*given(**sizes))
            model.float()
            assert_close(found, expected, truth, torch.float32, f"{method} {sizes}")


def test_meta_learning_through_lora_is_that_through_dense_weights(make_model, make_batch):
    """A step of gradient descent on A and B, differentiated through, against the base model with
    W + alpha / R · B A instead of W.
    """
    model, weights = make_model(LoraConfig(r=4, alpha=8.0))
    weights = {name: weight for name, weight in weights.items() if "lora_" in name}
    base = model.base_model
    first, second = make_batch(), make_batch(lengths=(5, 8, 3))

    def dense(weights, batch):
        merged = {}
        for name in weights:
            place = name.removesuffix(".lora_a")
            if place != name:
                update = weights[f"{place}.lora_b"] @ weights[name]
                merged[f"{place}.weight"] = (
                    base.get_parameter(f"{place.removeprefix('base_model.')}.weight") + 2.0 * update
                )
        zeros = {n: torch.zeros_like(w) for n, w in weights.items() if n.endswith("lora_b")}
        return functional_call(model, {**weights, **zeros, **merged}, (), batch).loss

    def meta_gradient(loss, weights, order=2):
        leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        inner = torch.autograd.grad(
            loss(leaves, first), list(leaves.values()), create_graph=order == 2
        )
        fast = {n: w - 0.5 * g for (n, w), g in zip(leaves.items(), inner, strict=True)}
        return vector(torch.autograd.grad(loss(fast, second), list(leaves.values())))

    def adapted(weights, batch):
        return loss_of(model, batch)(weights)

    found, baseline = meta_gradient(adapted, weights), meta_gradient(dense, weights)
    of_first_order = meta_gradient(adapted, weights, order=1)
    model, weights = in_double(model, weights)
    truth = meta_gradient(dense, weights)
    assert_close(found, baseline, truth, torch.float32, "meta gradient")
    with pytest.raises(AssertionError):
        assert_close(of_first_order, baseline, truth, torch.float32, "the first order's")


@pytest.mark.parametrize("method", ["lora", "unipelt"])
def test_gradients_of_each_sample(method, make_model, make_batch):
    model, weights = make_model(method)
    batch = make_batch(lengths=(7, 7, 7))
    del batch["attention_mask"]  # transformers asks whether it hides anything

    def loss(weights, ids, label):
        sample = {"input_ids": ids[None], "labels": label[None]}
        return functional_call(model, weights, (), sample).loss

    each = vmap(grad(loss), (None, 0, 0))
    found = each(weights, batch["input_ids"], batch["labels"])
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}

    def alone(leaves, n):
        value = loss(leaves, batch["input_ids"][n], batch["labels"][n])
        return vector(torch.autograd.grad(value, list(leaves.values()), materialize_grads=True))

    rows = [vector(g[n] for g in found.values()) for n in range(3)]
    baseline = [alone(leaves, n) for n in range(3)]
    model, doubled = in_double(model, weights)
    leaves = {name: weight.requires_grad_() for name, weight in doubled.items()}
    for n, row in enumerate(rows):
        assert_close(row, baseline[n], alone(leaves, n), torch.float32, f"{method}, sample {n}")


@pytest.mark.parametrize("method", ["lora", "unipelt", "adamix", "pst"])
def test_a_penalty_on_the_gradient_learns_through_checkpoints(method, make_model, make_batch):
    """The gradient by the words' vectors, squared, as a loss, with layers computed again."""
    batch = make_batch()
    ids = batch.pop("input_ids")
    gradients = []
    for is_checkpointed in (False, True):
        model, _ = make_model(method)
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        torch.manual_seed(0)
        words = model.get_input_embeddings()(ids).detach().requires_grad_()
        loss = model(inputs_embeds=words, **batch).loss
        (slope,) = torch.autograd.grad(loss, words, create_graph=True)
        trained = list(model.trained_parameters().values())
        grads = torch.autograd.grad(slope.square().sum(), trained, materialize_grads=True)
        gradients.append(vector(grads))
    assert gradients[0].abs().max() > 0 and torch.equal(*gradients)
