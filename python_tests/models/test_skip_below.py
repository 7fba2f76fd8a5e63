"""Parts that do no work for sentences whose gate is small: what is computed then, and what is not."""

from __future__ import annotations

import pytest
import torch
from language_models import make_language_model, make_pairs

import pelt_kernels
from pelt_kernels.methods import (
    BottleneckAdapterConfig,
    ControlPrefixesConfig,
    LoraConfig,
    PrefixTuningConfig,
    UniPELTConfig,
)
from pelt_kernels.models import get_pelt_model
from pelt_kernels.ops import gated_adapter

PARTS = ("adapter", "prefix", "lora")


def apl(only=PARTS, **adapter):
    parts = {
        "adapter": BottleneckAdapterConfig(bottleneck=4, **adapter),
        "prefix": PrefixTuningConfig(prefix_length=3, mid=None),
        "lora": LoraConfig(r=4),
    }
    return UniPELTConfig(**{name: part if name in only else None for name, part in parts.items()})


@pytest.fixture
def make_gated(make_base, make_batch, randomise):
    """family, config -> a randomised model, and a batch without labels."""

    def make(family, config, **options):
        base = make_base(**options) if family == "bert" else make_language_model(family)
        batch = make_batch() if family == "bert" else make_pairs(family)
        if family != "t5":
            batch.pop("labels")
        return randomise(get_pelt_model(base, config)), batch

    return make


def low_for(chosen, low=0.05, high=0.6):
    """A rule under which some parts have a low gate for some samples of a batch."""

    def rule(layer, kind, gate):
        is_low = torch.tensor(chosen.get(kind.rpartition("_")[0] or kind, ()), dtype=torch.long)
        made = torch.full_like(gate, high)
        made[is_low] = low
        return made

    return rule


@torch.no_grad()
@pytest.mark.parametrize("placement", ["sequential", "parallel"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_a_sentence_that_skips_every_part_has_what_the_base_model_gives(
    family, placement, make_gated
):
    model, batch = make_gated(family, apl(placement=placement))
    with model.disable_adapter():
        base = model(**batch).logits
    model.set_gate_rule(lambda layer, kind, gate: torch.full_like(gate, 0.6))
    whole = model(**batch).logits

    def only_the_second(layer, kind, gate):
        made = torch.full_like(gate, 0.6)
        made[1] = 0.05
        return made

    model.set_gate_rule(only_the_second)
    model.skip_below = 0.1
    found = model(**batch).logits
    expected = torch.stack([whole[0], base[1], whole[2]])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (whole[1] - base[1]).abs().max() > 1e-3
    model.set_gate_rule(lambda layer, kind, gate: torch.full_like(gate, 0.05))
    torch.testing.assert_close(model(**batch).logits, base, rtol=1e-5, atol=1e-5)
    model.skip_below = None
    assert (model(**batch).logits - base).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("part", PARTS)
def test_each_part_is_left_out_for_its_own_sentences(part, backend, make_gated):
    """A prefix as if there were none; an adapter and a branch as with a gate of 0."""
    model, batch = make_gated("bert", apl())
    without, _ = make_gated("bert", apl([each for each in PARTS if each != part]))
    own = model.trained_parameters()
    for name, parameter in without.trained_parameters().items():
        parameter.copy_(own[name])
    high = lambda layer, kind, gate: torch.full_like(gate, 0.6)  # noqa: E731
    without.set_gate_rule(high)
    model.set_gate_rule(high)
    whole, expected = model(**batch).logits, without(**batch).logits

    def rule(layer, kind, gate):
        made = torch.full_like(gate, 0.6)
        if kind.startswith(part):
            made[[0, 2]] = 0.05
        return made

    model.set_gate_rule(rule)
    model.skip_below = 0.1
    with pelt_kernels.use_backend(backend) if backend else torch.no_grad():
        found = model(**batch).logits
    expected[1] = whole[1]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_sentence_does_not_depend_on_the_others_of_its_batch(family, make_gated):
    model, batch = make_gated(family, apl())
    model.record_gates()
    model(**batch)
    gates = torch.cat([value.flatten() for value in model.gate_values().values()])
    model.skip_below = gates.median().item()
    together = model(**batch).logits
    for i in range(3):
        alone = model(**{name: each[i : i + 1] for name, each in batch.items()}).logits
        seen = batch["attention_mask"][i].bool() if family == "gpt2" else slice(None)
        torch.testing.assert_close(alone[0][seen], together[i][seen], rtol=1e-4, atol=1e-4)
    model.skip_below = 0.0
    assert (together - model(**batch).logits).abs().max() > 1e-3


@torch.no_grad()
def test_attributes_positions_and_weights_follow_the_sentences(make_base, make_batch, randomise):
    prefix = ControlPrefixesConfig(attributes={"topic": 2}, prefix_length=2, mid=None)
    config = UniPELTConfig(adapter=None, lora=None, prefix=prefix)
    model = randomise(get_pelt_model(make_base(attention="eager"), config))
    batch = make_batch(with_labels=False)
    options = {"attributes": {"topic": torch.tensor([1, 0, 1])}, "output_attentions": True}
    model.set_gate_rule(lambda layer, kind, gate: torch.full_like(gate, 0.6))
    whole = model(**batch, **options)
    model.set_gate_rule(low_for({"prefix": (0,)}))
    model.skip_below = 0.1
    found = model(**batch, **options)
    torch.testing.assert_close(found.logits[1:], whole.logits[1:], rtol=1e-5, atol=1e-5)
    columns = model.prefix.columns
    assert columns > 2
    for weights in found.attentions:
        assert torch.equal(weights[0, ..., :columns], torch.zeros_like(weights[0, ..., :columns]))
        assert (weights[1:, ..., :columns] > 0).all()
        torch.testing.assert_close(weights.sum(-1)[0], torch.ones(4, 9), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_compiled_model_gives_the_same(make_gated):
    model, batch = make_gated("bert", apl())
    model.set_gate_rule(low_for({"prefix": (0,), "lora": (1,), "adapter": (2,)}))
    model.skip_below = 0.1
    expected = model(**batch).logits
    found = torch.compile(model, backend="eager", fullgraph=True)(**batch).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_generated_words_are_those_of_a_model_without_the_parts(make_gated):
    model, batch = make_gated("gpt2", apl())
    with model.disable_adapter():
        base = model.generate(**batch, max_new_tokens=4, do_sample=False)
    model.set_gate_rule(lambda layer, kind, gate: torch.full_like(gate, 0.05))
    model.skip_below = 0.1
    assert torch.equal(model.generate(**batch, max_new_tokens=4, do_sample=False), base)


@torch.no_grad()
@pytest.mark.parametrize("gate", [torch.tensor([0.05, 0.6, 0.05]), torch.full((3,), 0.05)])
def test_rows_that_skip_an_adapter_are_not_multiplied(gate, monkeypatch):
    """In PyTorch's backend, whose products are seen here."""
    from pelt_kernels.ops.gated_adapter import eager

    rows, product = [], eager.linear
    monkeypatch.setattr(
        eager, "linear", lambda x, *rest: rows.append(x[..., 0].numel()) or product(x, *rest)
    )
    x, down, up = torch.randn(3, 5, 16), torch.randn(4, 16), torch.randn(16, 4)
    for residual in ("input", None, torch.randn(3, 5, 16)):
        options = {"gate": gate, "residual": residual, "backend": "eager"}
        y = gated_adapter(x, down, up, skip_below=0.1, **options)
        kept = int((gate >= 0.1).sum())
        assert rows == [5 * kept] * (2 if kept else 0)
        masked = gated_adapter(x, down, up, **options | {"gate": gate * (gate >= 0.1)})
        torch.testing.assert_close(y, masked, rtol=1e-5, atol=1e-6)
        rows.clear()


@torch.no_grad()
def test_a_branch_that_no_sentence_has_is_left_out(make_gated, monkeypatch):
    from pelt_kernels.nn import lora_linear as module

    branches, operator = [], module.lora_linear
    monkeypatch.setattr(
        module,
        "lora_linear",
        lambda x, w, b, of, **rest: branches.append(len(of)) or operator(x, w, b, of, **rest),
    )
    model, batch = make_gated("bert", apl())
    model.skip_below = 0.1
    model.set_gate_rule(low_for({"lora": (0, 1)}))
    model(**batch)
    assert sum(branches) == 4  # two in each of two layers
    branches.clear()
    model.set_gate_rule(low_for({"lora": (0, 1, 2)}))
    model(**batch)
    assert sum(branches) == 0


def test_it_is_refused_in_training_and_where_it_means_nothing(make_base, make_gated):
    model, batch = make_gated("bert", apl())
    model.skip_below = 0.1
    with pytest.raises(ValueError, match=r"expected skip_below=0.1 in inference.*keeps gradients"):
        model(**batch)
    with pytest.raises(ValueError, match="got one in training"), torch.no_grad():
        model.train()(**batch)
    for wrong in (-0.1, 1.5, "0.1", True):
        with pytest.raises(ValueError, match="expected a number from 0 to 1"):
            model.skip_below = wrong
    assert model.skip_below == 0.1
    model.skip_below = None
    model(**batch)
    with pytest.raises(ValueError, match="expected a method with gates"):
        get_pelt_model(make_base(), LoraConfig()).skip_below = 0.1
