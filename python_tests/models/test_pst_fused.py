"""PST where a Linear holds its weight transposed (Conv1D) or computes several projections."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from families import make_reader, make_writer
from torch import nn

from pelt_kernels.methods import PSTConfig
from pelt_kernels.models import PeltModel, get_pelt_model
from pelt_kernels.models.export import matrices_of
from pelt_kernels.nn import FusedPrunedLinear, PrunedLinear
from pelt_kernels.nn.original import is_transposed

PST = PSTConfig(sparsity=0.8, r1=3, r2=2, beta=0.5, alpha1=2.0, alpha2=0.25)
SOME = replace(PST, targets=("value", "ffn_in"))
MAKE = {"gpt2": make_writer, "modernbert": make_reader}


class Literal(nn.Module):
    """The product with a weight of which each projection is pruned by itself: the scores sorted,
    the lowest int(n k s) masked, and dL/dS := dL/dM by autograd.
    """

    def __init__(self, base, stand_in):
        super().__init__()
        self.base, self.stand_in = base, stand_in

    def forward(self, x):
        held = self.base.weight
        rows = list((held.T if is_transposed(self.base) else held).unbind())
        if isinstance(self.stand_in, PrunedLinear):
            matrices = [(0, self.stand_in)]
        else:
            stand_in = self.stand_in
            matrices = [(stand_in.offsets[n], m) for n, m in stand_in.matrices.items()]
        for start, p in matrices:
            n = len(p.score_row)
            w = torch.stack(rows[start : start + n]) + p.beta * p.update_u @ p.update_v
            scores = (
                w.abs()
                + p.alpha1 * p.score_a @ p.score_b
                + p.alpha2 * (p.score_row[:, None] + p.score_col[None, :])
            )
            mask = torch.ones(w.numel(), dtype=w.dtype)
            mask[scores.flatten().argsort()[: int(w.numel() * p.sparsity)]] = 0
            rows[start : start + n] = (mask.view_as(w) + scores - scores.detach()) * w
        return nn.functional.linear(x, torch.stack(rows), self.base.bias)


def inputs_of(family):
    ids = torch.randint(5, 99, (2, 7), generator=torch.Generator().manual_seed(1))
    labels = ids if family == "gpt2" else torch.tensor([0, 2])
    return {"input_ids": ids, "labels": labels}


def randomised(model, std=0.05):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.trained_parameters().values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise.to(parameter.dtype) * std)
    return model


def pruned_of(model):
    kinds = (PrunedLinear, FusedPrunedLinear)
    return {n: m for n, m in model.base_model.named_modules() if isinstance(m, kinds)}


@pytest.mark.parametrize("family", MAKE)
@pytest.mark.parametrize("config", [PST, SOME], ids=["all", "some"])
def test_training_equals_the_formula(config, family):
    base, batch = MAKE[family](family).double(), inputs_of(family)
    plain = copy.deepcopy(base)
    model = randomised(get_pelt_model(base, replace(config, train_head=False))).train()
    model.set_progress(0.5)
    for name, pruned in pruned_of(model).items():
        plain.set_submodule(name, Literal(plain.get_submodule(name), pruned))
    found, expected = model(**batch), plain.train()(**batch)
    torch.testing.assert_close(found.loss, expected.loss)
    parameters = list(model.trained_parameters().values())
    for got, wanted in zip(
        torch.autograd.grad(found.loss, parameters),
        torch.autograd.grad(expected.loss, parameters),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("family", MAKE)
@torch.no_grad()
def test_a_new_model_is_the_base_model_and_each_projection_is_a_matrix(family):
    base, batch = MAKE[family](family), inputs_of(family)
    expected = base(**batch).logits
    model = get_pelt_model(base, PST)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-6)
    density = model.density()
    assert set(density.values()) == {1.0}
    layers = len(model._injection.states)
    assert len(density) == len(matrices_of(model.remove())) == layers * (6 + (family != "gpt2"))


@pytest.mark.parametrize("family", MAKE)
@pytest.mark.parametrize("config", [PST, SOME], ids=["all", "some"])
@torch.no_grad()
def test_the_exported_model_has_the_asked_zeros_in_each_matrix(config, family, tmp_path):
    batch = inputs_of(family)
    model = randomised(get_pelt_model(MAKE[family](family), config)).eval()
    model.set_progress(1.0)
    model.save_pretrained(tmp_path)
    expected, density = model(**batch).logits, model.density()
    weights = {name: pruned.pruned_weight() for name, pruned in pruned_of(model).items()}
    again = PeltModel.from_pretrained(MAKE[family](family), tmp_path)
    assert torch.equal(again(**batch).logits, expected)
    assert again.density() == density
    plain = model.export_dense()
    for name, weight in weights.items():
        assert torch.equal(plain.get_submodule(name).weight, weight)
    torch.testing.assert_close(plain(**batch).logits, expected, rtol=1e-5, atol=1e-6)
    for matrix in matrices_of(plain):
        is_pruned = matrix.place.removesuffix("_2") in config.targets
        assert matrix.zeros == (int(matrix.entries * config.sparsity) if is_pruned else 0)
        if is_pruned:
            whole = density.get(matrix.name, density.get(f"{matrix.name}.{matrix.place}"))
            assert whole == (matrix.entries - matrix.zeros) / matrix.entries


@pytest.mark.parametrize("family", MAKE)
@torch.no_grad()
def test_a_hook_of_the_linear_sees_the_pruned_product(family):
    path = "transformer.h.1.attn.c_attn" if family == "gpt2" else "model.layers.1.attn.Wqkv"
    base, batch = MAKE[family](family), inputs_of(family)
    torch.manual_seed(0)
    model = randomised(get_pelt_model(base, PST)).eval()
    model.set_progress(1.0)
    expected = model(**batch).logits
    first = {n: v.clone() for n, v in model.remove().state_dict().items()}
    seen = []
    base.get_submodule(path).register_forward_hook(lambda *args: seen.append(args[2]))
    torch.manual_seed(0)
    model = randomised(get_pelt_model(base, PST)).eval()
    model.set_progress(1.0)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-6)
    assert len(seen) == 1 and seen[0].shape == (2, 7, 96)
    assert all(torch.equal(v, first[n]) for n, v in model.remove().state_dict().items())
