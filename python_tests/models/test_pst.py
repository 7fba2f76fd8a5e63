"""PST against its formula written out, its schedule, its export, and its life in a model."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from every_method import METHODS
from torch import nn
from torch.nn.functional import linear

from pelt_kernels.methods import PSTConfig
from pelt_kernels.models import PeltModel, get_pelt_model
from pelt_kernels.nn import PrunedLinear

PST = PSTConfig(sparsity=0.8, r1=3, r2=2)


class Literal(nn.Module):
    """One pruned Linear by methods.md's words: an argsort, and dL/dS := dL/dM by autograd."""

    def __init__(self, base, pruned):
        super().__init__()
        self.base, self.pruned = base, pruned

    def forward(self, x):
        p = self.pruned
        w = self.base.weight + p.beta * p.update_u @ p.update_v
        scores = (
            w.abs()
            + p.alpha1 * p.score_a @ p.score_b
            + p.alpha2 * (p.score_row[:, None] + p.score_col[None, :])
        )
        mask = torch.ones(w.numel(), dtype=w.dtype)
        mask[scores.flatten().argsort()[: int(w.numel() * p.sparsity)]] = 0
        mask = mask.view_as(w) + scores - scores.detach()
        return linear(x, mask * w, self.base.bias)


def pruned_of(model):
    return {n: m for n, m in model.base_model.named_modules() if isinstance(m, PrunedLinear)}


def test_training_equals_the_formula(make_base, make_batch, randomise):
    base, batch = make_base(dtype=torch.float64), make_batch()
    plain = copy.deepcopy(base)
    config = replace(PST, beta=0.5, alpha1=2.0, alpha2=0.25)
    model = randomise(get_pelt_model(base, config), std=0.05).train()
    model.set_progress(0.5)
    for name, pruned in pruned_of(model).items():
        assert 0 < pruned.sparsity < 0.8
        plain.set_submodule(name, Literal(plain.get_submodule(name), pruned))
    plain.classifier = model.base_model.classifier
    found, expected = model(**batch), plain.train()(**batch)
    torch.testing.assert_close(found.loss, expected.loss)
    parameters = list(model.trained_parameters().values())
    for got, wanted in zip(
        torch.autograd.grad(found.loss, parameters),
        torch.autograd.grad(expected.loss, parameters),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


def test_a_new_model_is_the_base_model_and_six_linears_a_layer_are_pruned(make_base, make_batch):
    base, batch = make_base(), make_batch(with_labels=False)
    expected = base(**batch).logits
    model = get_pelt_model(base, PST)
    assert torch.equal(model(**batch).logits, expected)
    assert len(pruned_of(model)) == 2 * 6
    assert set(model.density().values()) == {1.0}


def test_the_schedule_is_cubic():
    at = PSTConfig(sparsity=0.9).sparsity_at
    assert [at(0.0), at(0.1), at(0.70001), at(1.0)] == [0.0, 0.0, 0.9, 0.9]
    for progress in (0.11, 0.3, 0.55, 0.7):
        wanted = 0.9 + (0 - 0.9) * (1 - (progress - 0.1) / 0.6) ** 3
        assert at(progress) == pytest.approx(wanted)


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_the_exported_model_has_the_asked_zeros_and_the_same_logits(
    sparsity, make_base, make_batch, randomise, tmp_path
):
    batch = make_batch(with_labels=False)
    model = randomise(get_pelt_model(make_base(), replace(PST, sparsity=sparsity))).eval()
    model.set_progress(1.0)
    model.save_pretrained(tmp_path)
    expected = model(**batch).logits
    again = PeltModel.from_pretrained(make_base(), tmp_path)
    assert torch.equal(again(**batch).logits, expected)
    names, density = list(pruned_of(model)), model.density()
    plain = model.export_dense()
    assert type(plain) is type(make_base())
    assert torch.equal(plain(**batch).logits, expected)
    for name in names:
        weight = plain.get_submodule(name).weight
        zeros = int(weight.numel() * sparsity)
        assert int((weight == 0).sum()) == zeros
        assert density[name] == (weight.numel() - zeros) / weight.numel()


def test_the_classifier_is_trained_unless_the_official_omission_is_asked_for(make_base, make_batch):
    for train_head in (True, False):
        model = get_pelt_model(make_base(), replace(PST, train_head=train_head)).train()
        model.set_progress(0.0)
        model(**make_batch()).loss.backward()
        head = model.base_model.classifier
        assert all((p.grad is not None) == train_head for p in head.parameters())
        assert any("classifier" in name for name in model.trained_parameters()) == train_head


def test_the_model_comes_back_untouched(make_base, make_batch, randomise):
    base, batch = make_base(), make_batch(with_labels=False)
    expected = base(**batch).logits
    model = randomise(get_pelt_model(base, PST))
    model.set_progress(1.0)
    assert not torch.equal(model(**batch).logits, expected)
    assert torch.equal(model.remove()(**batch).logits, expected)


def test_evaluation_follows_the_sparsity(make_base, make_batch, randomise):
    model = randomise(get_pelt_model(make_base(), PST), std=0.05).eval()
    batch = make_batch(with_labels=False)
    with torch.inference_mode():
        first = model(**batch).logits
        model.set_progress(1.0)
        assert not torch.equal(model(**batch).logits, first)
        model.set_progress(0.0)
        assert torch.equal(model(**batch).logits, first)


@pytest.mark.parametrize("method", ["pst", "adamix", "adamix-lora"])
def test_after_inference_mode_comes_a_forward_with_gradients(
    method, make_base, make_batch, randomise
):
    model = randomise(get_pelt_model(make_base(), METHODS[method]), std=0.05).eval()
    model.requires_grad_(False)
    batch = make_batch(with_labels=False)
    with torch.inference_mode():
        expected = model(**batch).logits
    embedded = model.get_input_embeddings()(batch.pop("input_ids")).requires_grad_()
    found = model(inputs_embeds=embedded, **batch).logits
    torch.testing.assert_close(found, expected)
    assert torch.autograd.grad(found.sum(), embedded)[0].abs().max() > 0


BAD = [
    (lambda: PSTConfig(sparsity=1.0), r"expected sparsity in \[0, 1\), got 1.0"),
    (lambda: PSTConfig(sparsity=-0.1), r"expected sparsity in \[0, 1\), got -0.1"),
    (lambda: PSTConfig(end=1.5), r"the schedule is longer than the training"),
    (lambda: PSTConfig(begin=0.8), r"begin < end <= 1"),
    (lambda: PSTConfig(r1=0), r"expected r1 as a whole number >= 1, got 0"),
    (lambda: PSTConfig(targets=()), r"expected targets as a list of different names out of"),
]


@pytest.mark.parametrize(("make", "sentence"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_configs_are_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
