"""Layers without a prefix: on a CPU the kernels stand for PyTorch's attention, and only where they
compute the same.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from closeness import assert_close
from every_method import LORA, PREFIX
from families import ENCODERS, make_writer
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

from pelt_kernels import explain, use_backend
from pelt_kernels.methods import BitFitConfig
from pelt_kernels.models import get_pelt_model, sdpa
from pelt_kernels.ops import forget_choices

pytestmark = pytest.mark.backend("cpu")
NEVER = 1 << 62


@pytest.fixture
def pays_from(monkeypatch):
    """Sets the scores from which the kernels are asked."""

    def pays_from(scores: int) -> None:
        monkeypatch.setattr(sdpa, "PAYS_FROM", scores)
        monkeypatch.setattr(sdpa, "PAYS_FROM_WITH_DROPOUT", scores)
        forget_choices()

    return pays_from


def calls():
    """The forwards that the kernels served."""
    return [choice for choice in explain("prefix_attention") if choice.backend == "cpu"]


def results(model, batch):
    """The logits, and the gradient of everything trained."""
    logits = model(**batch).logits
    trained = model.trained_parameters()
    weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).view(logits.shape)
    found = torch.autograd.grad((logits * weights.to(logits)).sum(), list(trained.values()))
    return {"logits": logits} | dict(zip(trained, found))


def plain_calls():
    """Those without a prefix."""
    return [choice for choice in calls() if "P_i" not in choice.call]


def check(make, batch, pays_from):
    """The kernels beside PyTorch's attention and the truth; ``make(dtype, seed)`` gives a model,
    with other values of what is trained where PyTorch's attention is right by chance.
    """

    @cache
    def pair(seed):
        pays_from(NEVER)
        found = [results(make(dtype, seed), batch) for dtype in (torch.float32, torch.float64)]
        assert not plain_calls()
        return found

    pair(2)
    pays_from(0)
    found = results(make(torch.float32, 2), batch)
    assert plain_calls()
    for name, value in found.items():
        baseline, truth = (each[name] for each in pair(2))
        others = ([each[name] for each in pair(seed)] for seed in range(3, 7))
        assert_close(value, baseline, truth, torch.float32, name, others)


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("is_padded", (True, False))
def test_encoders_give_what_sdpa_gives(
    make_base, make_batch, randomise, pays_from, family, is_padded
):
    batch = make_batch((9, 4, 7) if is_padded else (9, 9, 9), with_labels=False)
    if not is_padded:
        del batch["attention_mask"]
    config = BitFitConfig() if family == "electra" else LORA
    check(
        lambda dtype, seed: randomise(
            get_pelt_model(make_base(family, dtype=dtype), config), seed=seed
        ),
        batch,
        pays_from,
    )


@pytest.mark.parametrize("family", ("gpt2", "llama"))
def test_writers_give_what_sdpa_gives(randomise, pays_from, family):
    batch = {"input_ids": torch.randint(6, 99, (3, 8), generator=torch.Generator().manual_seed(1))}

    def make(dtype, seed):
        torch.manual_seed(0)
        return randomise(get_pelt_model(make_writer(family).to(dtype), LORA), seed=seed)

    check(make, batch, pays_from)


def test_masks_of_other_kinds_go_to_sdpa(make_base, make_batch, randomise, pays_from):
    """Sentences packed into one, and a writer's padding."""
    model = randomise(get_pelt_model(make_base(), LORA))
    batch = make_batch((8, 8), with_labels=False)
    of = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    batch["attention_mask"] = (of[:, None] == of)[None, None].expand(2, 1, 8, 8)
    pays_from(NEVER)
    expected = model(**batch).logits
    pays_from(0)
    assert torch.equal(model(**batch).logits, expected) and not calls()
    torch.manual_seed(0)
    writer = randomise(get_pelt_model(make_writer("gpt2"), LORA))
    batch = {"input_ids": torch.full((2, 6), 7), "attention_mask": torch.ones(2, 6).long()}
    batch["attention_mask"][0, :2] = 0
    pays_from(NEVER)
    expected = writer(**batch).logits
    pays_from(0)
    assert torch.equal(writer(**batch).logits, expected) and not calls()


def test_a_writer_goes_on_from_its_cache(randomise, pays_from):
    torch.manual_seed(0)
    writer = randomise(get_pelt_model(make_writer("llama"), LORA))
    ids = torch.randint(6, 99, (2, 6), generator=torch.Generator().manual_seed(1))
    pays_from(NEVER)
    expected = writer.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    pays_from(0)
    assert torch.equal(writer.generate(input_ids=ids, max_new_tokens=5, do_sample=False), expected)
    assert calls() and not any(" S=1 " in choice.call for choice in calls())


def test_layers_beside_those_with_a_prefix(make_base, make_batch, randomise, pays_from):
    """Their masks come from another mask function."""
    config = PREFIX.__class__(prefix_length=3, mid=8, skip_layers=(0,))
    check(
        lambda dtype, seed: randomise(get_pelt_model(make_base(dtype=dtype), config), seed=seed),
        make_batch(with_labels=False),
        pays_from,
    )
    assert len(calls()) > len(plain_calls())


def test_dropout_is_of_the_attention_and_repeats_with_the_seed(make_base, make_batch, pays_from):
    pays_from(0)
    base = make_base(dropout=0.0)
    for layer in base.bert.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    model, batch = get_pelt_model(base, LORA), make_batch(with_labels=False)
    expected = model(**batch).logits
    model.train()
    drawn = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        drawn.append(model(**batch).logits)
    assert torch.equal(drawn[0], drawn[2]) and not torch.allclose(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], expected)
    assert torch.allclose(model.eval()(**batch).logits, expected)


def test_who_asks_for_another_attention_gets_it(make_base, make_batch, pays_from):
    batch = make_batch(with_labels=False)
    pays_from(0)
    get_pelt_model(make_base(attention="eager"), LORA)(**batch)
    with use_backend("eager"):
        get_pelt_model(make_base(), LORA)(**batch)
    get_pelt_model(make_base(dtype=torch.float64), LORA)(**batch)
    model = get_pelt_model(make_base(), LORA)
    model.base_model.set_attn_implementation("eager")
    model(**batch)
    torch.compile(get_pelt_model(make_base(), LORA), backend="eager")(**batch)
    assert not calls()
    with use_backend("cpu:baseline"):
        get_pelt_model(make_base(), LORA)(**batch)
    assert [choice.served for choice in calls()] == ["cpu:baseline"]


def test_small_calls_go_to_sdpa(make_base, make_batch, monkeypatch):
    forget_choices()
    model, batch = get_pelt_model(make_base(), LORA), make_batch(with_labels=False)
    model(**batch)
    assert not calls()
    monkeypatch.setattr(sdpa, "PAYS_FROM", 3 * 4 * 9 * 9)
    model(**batch)
    assert calls()


def test_a_removed_method_leaves_sdpa(make_base, make_batch, pays_from):
    base, batch = make_base(), make_batch(with_labels=False)
    expected = base(**batch).logits
    model = get_pelt_model(base, LORA)
    assert base.bert.config._attn_implementation == "pelt_sdpa"
    assert model.config._attn_implementation == "sdpa"
    model.remove()
    pays_from(0)
    assert base.bert.config._attn_implementation == "sdpa"
    assert torch.equal(base(**batch).logits, expected) and not calls()


@pytest.mark.parametrize("kind", (bidirectional_mask_function, causal_mask_function))
@pytest.mark.parametrize("skips", (True, False))
def test_masks_have_the_values_of_sdpas(kind, skips):
    padded = torch.tensor([[True, True, True, False], [True] * 4])
    for mask in (padded, torch.ones(2, 4, dtype=torch.bool), None):
        options = {
            "batch_size": 2, "q_length": 4, "kv_length": 4, "mask_function": kind,
            "attention_mask": mask, "allow_is_bidirectional_skip": skips,
            "allow_is_causal_skip": skips and kind is causal_mask_function,
        }  # fmt: skip
        expected, found = sdpa_mask(**options), sdpa.padding_or_sdpa_mask(**options)
        assert (found is None) == (expected is None)
        if expected is not None:
            assert torch.equal(found, expected)
