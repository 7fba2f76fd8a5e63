"""Layers without a prefix: on a CPU the kernels stand for PyTorch's attention, and only where they
compute the same.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from closeness import assert_close
from every_method import LORA, PREFIX
from families import ENCODERS, make_writer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

from pelt_kernels import explain, use_backend
from pelt_kernels.methods import BitFitConfig
from pelt_kernels.models import get_pelt_model, sdpa
from pelt_kernels.ops import forget_choices
from pelt_kernels.ops.prefix_attention import without_prefix

pytestmark = pytest.mark.backend("cpu")
NEVER = 1 << 62
PARTLY_PREFIX = PREFIX.__class__(prefix_length=3, mid=8, skip_layers=(0,))


@pytest.fixture
def pays_from(monkeypatch):
    """Sets the scores from which the kernels are asked."""

    def pays_from(scores: int) -> None:
        monkeypatch.setattr(without_prefix, "PAYS_FROM", scores)
        monkeypatch.setattr(without_prefix, "PAYS_FROM_WITH_DROPOUT", scores)
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
@pytest.mark.parametrize("padding", (None, "left", "right"))
@pytest.mark.parametrize("config", (LORA, PARTLY_PREFIX))
def test_writers_give_what_sdpa_gives(randomise, pays_from, family, padding, config):
    batch = {"input_ids": torch.randint(6, 99, (3, 8), generator=torch.Generator().manual_seed(1))}
    if padding:
        batch["attention_mask"] = torch.ones(3, 8, dtype=torch.long)
        hidden = slice(0, 3) if padding == "left" else slice(5, 8)
        batch["attention_mask"][1, hidden] = 0

    def make(dtype, seed):
        torch.manual_seed(0)
        return randomise(get_pelt_model(make_writer(family).to(dtype), config), seed=seed)

    check(make, batch, pays_from)


def test_masks_of_other_kinds_go_to_sdpa(make_base, make_batch, randomise, pays_from):
    """Sentences packed into one."""
    model = randomise(get_pelt_model(make_base(), LORA))
    batch = make_batch((8, 8), with_labels=False)
    of = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    batch["attention_mask"] = (of[:, None] == of)[None, None].expand(2, 1, 8, 8)
    pays_from(NEVER)
    expected = model(**batch).logits
    pays_from(0)
    assert torch.equal(model(**batch).logits, expected) and not calls()


CAUSAL = torch.ones(4, 6, dtype=torch.bool).tril(2)  # the queries stand at the last keys
TOKENS = torch.tensor([[False, True, True, True, True, True], [True] * 4 + [False] * 2])[:, None]
SENTENCES = torch.tensor([0, 0, 0, 0, 1, 1])
OTHERS = {
    "a window": CAUSAL & ~CAUSAL.tril(-1),
    "causal from the first key on": torch.ones(4, 6, dtype=torch.bool).tril(),
    "packed sentences": CAUSAL & (SENTENCES[2:, None] == SENTENCES),
    "one key hidden from one query": TOKENS.expand(2, 4, 6).clone().index_fill(
        1, torch.tensor(1), False),
    "heads that differ": TOKENS[:, None].expand(2, 3, 4, 6),
    "numbers": torch.zeros(2, 1, 4, 6),
}  # fmt: skip


def four(mask):
    """[2, 1, 4, 6]."""
    return mask if mask.ndim == 4 else mask.expand(2, 4, 6)[:, None]


@pytest.mark.parametrize("mask", (CAUSAL, CAUSAL & TOKENS, TOKENS))
def test_what_a_mask_lets_queries_see_is_told_by_its_values(mask):
    query, key = torch.empty(2, 3, 4, 8), torch.empty(2, 3, 6, 8)
    for given in (four(mask), four(mask).detach()):
        seen = sdpa.seen_keys(query, key, given, True)
        found = CAUSAL if seen.is_causal else torch.ones_like(CAUSAL)
        if seen.key_mask is not None:
            found = found & seen.key_mask[:, None]
        assert torch.equal(four(found), four(mask))


@pytest.mark.parametrize("name", OTHERS)
def test_a_mask_that_shows_other_keys_is_for_sdpa(name):
    query, key = torch.empty(2, 3, 4, 8), torch.empty(2, 3, 6, 8)
    assert sdpa.seen_keys(query, key, four(OTHERS[name]), True) is None


@pytest.mark.parametrize("config", (LORA, PARTLY_PREFIX))
def test_relative_positions_are_added_to_the_scores(randomise, pays_from, config):
    """T5's, in both stacks; over the encoder they are zeros."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(6, 99, (2, 3, 8), generator=generator)
    seen = torch.ones(3, 8, dtype=torch.long)
    seen[1, 5:] = 0
    batch = {"input_ids": ids[0], "attention_mask": seen, "decoder_input_ids": ids[1]}

    def make(dtype, seed):
        torch.manual_seed(0)
        return randomise(get_pelt_model(make_writer("t5").to(dtype), config), seed=seed)

    check(make, batch | {"decoder_attention_mask": seen}, pays_from)


def test_a_query_that_sees_no_key_is_sdpas_beside_a_bias(pays_from):
    """There it sees all, since sdpa hides keys by the lowest number."""
    pays_from(0)
    q, k, v = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(1)).unbind()
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    mask = (causal & torch.tensor([False, True, True, True, True])).expand(2, 1, 5, 5)
    bias = {"position_bias": torch.randn(1, 4, 5, 5, generator=torch.Generator().manual_seed(2))}
    module = SimpleNamespace(is_causal=True)
    for seen, served in ((causal.expand(2, 1, 5, 5), True), (mask, False)):
        forget_choices()
        found, _ = sdpa.sdpa_forward(module, q, k, v, seen, **bias)
        assert bool(calls()) == served
        expected, _ = sdpa_attention_forward(module, q, k, v, seen, **bias)
        torch.testing.assert_close(found, expected)


def test_without_a_mask_causal_queries_count_from_the_first_key():
    query, key = torch.empty(2, 3, 4, 8), torch.empty(2, 3, 6, 8)
    assert sdpa.seen_keys(query, key, None, True) is None
    assert sdpa.seen_keys(query, key, None, False) == (None, False)
    assert sdpa.seen_keys(query, query, None, True) == (None, True)


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
    check(
        lambda dtype, seed: randomise(
            get_pelt_model(make_base(dtype=dtype), PARTLY_PREFIX), seed=seed
        ),
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
    monkeypatch.setattr(without_prefix, "PAYS_FROM", 3 * 4 * 9 * 9)
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
