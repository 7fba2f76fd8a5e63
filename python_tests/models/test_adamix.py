"""AdaMix against its formula written out, the traps of the official code, and its life in a model."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu, kl_div, linear

from pelt_kernels.methods import AdaMixConfig, HeadConfig, LoraConfig
from pelt_kernels.models import PeltModel, get_pelt_model
from pelt_kernels.nn import Bank, spare_unselected

ADAPTER = AdaMixConfig(reduction_factor=8)
LORA = AdaMixConfig(kind="lora", experts=3, r=2)
KINDS = {"adapter": ADAPTER, "lora": LORA, "both_banks": AdaMixConfig(share_up=False)}


class Literal(nn.Module):
    """One projection of a plain model and the drawn members of its banks, by methods.md's words."""

    def __init__(self, base, bank, config, draws):
        super().__init__()
        self.base, self.bank, self.config, self.draws = base, bank, config, draws

    def forward(self, x):
        f = linear(x, self.base.weight, self.base.bias)
        j, k = self.draws
        member = {name: getattr(self.bank, name) for names in self.bank.SIDES for name in names}
        if self.config.kind == "adapter":
            k = 0 if self.config.share_up else k
            hidden = gelu(linear(f, member["w_down"][j], member["b_down"][j]))
            return linear(hidden, member["w_up"][k], member["b_up"][k]) + f
        k = 0 if self.config.share_up else k
        update = linear(linear(x, member["lora_a"][j]), member["lora_b"][k])
        return f + self.config.alpha / self.config.r * update


def banks_of(model):
    return [module for module in model.modules() if isinstance(module, Bank)]


def literal_model(model, base, draws, passed):
    """A plain copy of the base model with `Literal`s in it, for the draws of one pass."""
    plain, config = copy.deepcopy(base), model.method_config
    banks = iter(banks_of(model))
    for layer in plain.bert.encoder.layer:
        places = (
            [(layer.output, "dense")]
            if config.kind == "adapter"
            else [(layer.attention.self, target) for target in config.targets]
        )
        for parent, name in places:
            bank = next(banks)
            drawn = draws[bank][passed]
            setattr(parent, name, Literal(getattr(parent, name), bank, config, drawn))
    plain.classifier = model.base_model.classifier
    return plain


@pytest.mark.parametrize("kind", KINDS)
def test_training_equals_the_formula_and_bert_has_its_consistency_loss(
    kind, make_base, make_batch, randomise, draws
):
    base, batch = make_base(dtype=torch.float64), make_batch()
    plain, labels = copy.deepcopy(base), batch["labels"]
    config = replace(KINDS[kind], consistency=2.0)
    model = randomise(get_pelt_model(base, config)).train()
    found = model(**batch)
    given = {k: v for k, v in batch.items() if k != "labels"}
    z1, z2 = (literal_model(model, plain, draws, p).train()(**given).logits for p in (0, 1))
    p1, p2 = z1.log_softmax(-1), z2.log_softmax(-1)
    consistency = 0.5 * (
        kl_div(p1, p2.detach().exp(), reduction="batchmean")
        + kl_div(p2, p1.detach().exp(), reduction="batchmean")
    )
    expected = cross_entropy(z1, labels) + 2.0 * consistency
    assert consistency > 1e-6
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(found.logits, z1)
    parameters = list(model.trained_parameters().values())
    for got, wanted in zip(
        torch.autograd.grad(found.loss, parameters),
        torch.autograd.grad(expected, parameters, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_the_average_of_each_bank_and_merging_keeps_every_bit(
    kind, make_base, make_batch, randomise, tmp_path
):
    base, batch = make_base(), make_batch(with_labels=False)
    model = randomise(get_pelt_model(base, KINDS[kind])).eval()
    full = tmp_path / "experts"
    model.save_pretrained(full)
    with torch.no_grad():
        expected = model(**batch).logits
    means = {
        name: value.mean(0) for name, value in model.trained_parameters().items() if value.ndim == 3
    }
    model.merge_experts()
    assert model.method_config.experts == 1 and all(len(b.averages()) for b in banks_of(model))
    for name, value in means.items():
        assert torch.equal(dict(model.named_parameters())[name], value[None]), name
    model.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)
        for folder, config in ((full, KINDS[kind]), (tmp_path / "merged", model.method_config)):
            again = PeltModel.from_pretrained(make_base(), folder)
            assert again.method_config == config
            assert torch.equal(again(**batch).logits, expected)
    assert model.train()(**make_batch()).loss.isfinite()  # a single adapter still trains


def test_unselected_experts_are_neither_decayed_nor_moved(make_base, make_batch, draws):
    model, batch = get_pelt_model(make_base(), ADAPTER).train(), make_batch()
    optimizer = torch.optim.AdamW(model.trained_parameters().values(), lr=0.01, weight_decay=0.5)
    spare_unselected(optimizer, model)
    for _ in range(6):
        before = [bank.w_down.detach().clone() for bank in banks_of(model)]
        moments = [
            optimizer.state[bank.w_down].get("exp_avg", torch.zeros(())).clone()
            for bank in banks_of(model)
        ]
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        for bank, old, moment in zip(banks_of(model), before, moments, strict=True):
            drawn = {down for down, _ in draws[bank][-2:]}
            for expert in range(4):
                stayed = torch.equal(bank.w_down[expert], old[expert])
                assert stayed == (expert not in drawn)
                if stayed and moment.ndim:
                    kept = optimizer.state[bank.w_down]["exp_avg"][expert]
                    assert torch.equal(kept, moment[expert])


def test_lora_experts_start_identical_only_where_the_official_code_is_asked_for(make_base):
    for config in (ADAPTER, LORA):
        bank = banks_of(get_pelt_model(make_base(), config))[0]
        experts = getattr(bank, bank.SIDES[0][0])
        assert not any(torch.equal(experts[0], other) for other in experts[1:])
    bank = banks_of(get_pelt_model(make_base(), replace(LORA, identical_start=True)))[0]
    assert all(torch.equal(bank.lora_a[0], other) for other in bank.lora_a[1:])
    assert bank.lora_a.any() and not bank.lora_b.any()


def test_draws_are_uniform_and_independent_of_side_module_and_forward(make_base, make_batch, draws):
    config = AdaMixConfig(reduction_factor=8, share_up=False, consistency=0.0)
    model, batch = get_pelt_model(make_base(num_hidden_layers=1), config).train(), make_batch()
    with torch.no_grad():
        for _ in range(400):
            model(**batch)
    (drawn,) = map(torch.tensor, draws.values())
    assert drawn.shape == (400, 2)
    cells = torch.bincount(drawn[:, 0] * 4 + drawn[:, 1], minlength=16) / 400
    assert bool((cells - 1 / 16).abs().max() < 0.06)
    repeats = (drawn[1:] == drawn[:-1]).float().mean(0)
    assert bool((repeats - 0.25).abs().max() < 0.1)


def test_a_regression_says_that_it_has_no_consistency(make_base, make_batch, draws):
    with pytest.warns(UserWarning, match="the consistency loss of a regression is 0"):
        model = get_pelt_model(make_base(num_labels=1), ADAPTER).train()
    batch = make_batch() | {"labels": torch.tensor([0.1, 0.2, 0.3])}
    assert model(**batch).loss.isfinite()
    assert [len(drawn) for drawn in draws.values()] == [1, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_pelt_model(make_base(num_labels=1), replace(ADAPTER, consistency=0.0))


def test_an_adapter_saved_with_a_routing_seed_still_loads():
    values = ADAPTER.to_dict() | {"routing_seed": 3}
    assert AdaMixConfig.from_dict(values) == ADAPTER
    with pytest.raises(ValueError, match="got the unknown 'routing'"):
        AdaMixConfig.from_dict(ADAPTER.to_dict() | {"routing": 3})


def test_the_model_comes_back_untouched(make_base, make_batch):
    base, batch = make_base(), make_batch(with_labels=False)
    expected = base(**batch).logits
    model = get_pelt_model(base, ADAPTER)
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, expected)
    assert torch.equal(model.remove()(**batch).logits, expected)


BAD = [
    (lambda: AdaMixConfig(experts=0), r"expected experts as a whole number >= 1, got 0"),
    (lambda: AdaMixConfig(kind="prefix"), r"expected kind to be one of adapter, lora"),
    (lambda: AdaMixConfig(share_down=True), r"share_down or share_up to be False with 4 experts"),
    (lambda: AdaMixConfig(consistency=-1.0), r"expected consistency >= 0, got -1.0"),
    (lambda: AdaMixConfig(kind="lora", r=0), r"expected r as a whole number >= 1, got 0"),
]


@pytest.mark.parametrize(("make", "sentence"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_configs_are_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


@pytest.mark.parametrize("config", [HeadConfig(), LoraConfig(gated=True)])
def test_only_experts_can_be_merged(config, make_base):
    with pytest.raises(ValueError, match="merge_experts: expected the method 'adamix', alone"):
        get_pelt_model(make_base(), config).merge_experts()
