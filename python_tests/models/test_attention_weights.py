"""output_attentions=True: outputs are what they are without, and every layer tells its weights,
prefix columns in front.
"""

from __future__ import annotations

import logging

import pytest
import torch
from closeness import assert_close

from pelt_kernels import prefix_attention
from pelt_kernels.methods import PrefixTuningConfig, UniPELTConfig
from pelt_kernels.models import get_pelt_model
from pelt_kernels.models.attention import logger
from pelt_kernels.ops import Prefix
from pelt_kernels.ops.prefix_attention.weights import attention_weights

P, H, S = 5, 4, 9
PREFIX = PrefixTuningConfig(prefix_length=P, mid=8)


def check_rows(weights, attention_mask, prefix_length):
    """Rows sum to 1, prefix columns are always seen, padding never."""
    own = attention_mask.shape[1]
    assert weights.shape == (attention_mask.shape[0], H, own, prefix_length + own)
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    seen = torch.cat([torch.ones(len(attention_mask), prefix_length), attention_mask], 1).bool()
    assert torch.equal(weights.ne(0), seen[:, None, None].expand_as(weights))


@pytest.mark.parametrize("family", ("bert", "distilbert", "electra"))
@pytest.mark.parametrize("attention", ("eager", "sdpa"))
def test_outputs_stay_and_rows_sum_to_one(make_base, make_batch, randomise, family, attention):
    batch = make_batch(with_labels=False)
    model = randomise(get_pelt_model(make_base(family, attention), PREFIX))
    found = model(**batch, output_attentions=True)
    assert torch.equal(found.logits, model(**batch).logits)
    assert model(**batch).attentions is None and len(found.attentions) == 2
    for weights in found.attentions:
        check_rows(weights, batch["attention_mask"], P)


def test_a_gate_keeps_the_sum(make_base, make_batch, randomise):
    batch = make_batch(with_labels=False)
    config = UniPELTConfig(prefix=PrefixTuningConfig(prefix_length=P, mid=8, gated=True))
    model = randomise(get_pelt_model(make_base(), config))
    found = model(**batch, output_attentions=True)
    assert torch.equal(found.logits, model(**batch).logits)
    for weights in found.attentions:
        check_rows(weights, batch["attention_mask"], P)


@pytest.mark.parametrize("attention", ("eager", "sdpa"))
def test_layers_without_a_prefix_tell_theirs(make_base, make_batch, randomise, attention):
    """No entry is missing, so the i-th weights are the i-th layer's."""
    batch = make_batch(with_labels=False)
    config = PrefixTuningConfig(prefix_length=P, mid=8, skip_layers=(0,))
    base = make_base(attention=attention)
    model = randomise(get_pelt_model(base, config))
    first, second = model(**batch, output_attentions=True).attentions
    check_rows(first, batch["attention_mask"], 0)
    check_rows(second, batch["attention_mask"], P)
    if attention == "eager":
        with model.disable_adapter():
            truth = model(**batch, output_attentions=True).attentions[0]
        torch.testing.assert_close(first, truth)


def test_the_base_model_inside_is_asked_likewise(make_base, make_batch):
    base, batch = make_base(attention="eager"), make_batch(with_labels=False)
    base.config.output_attentions = True
    get_pelt_model(base, PREFIX)
    assert [w.shape[-1] for w in base(**batch).attentions] == [P + S, P + S]
    assert base(**batch, output_attentions=False).attentions is None


def test_it_says_once_what_that_costs(make_base, make_batch, monkeypatch):
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    type(logger).warning_once.cache_clear()
    logger.addHandler(handler)
    try:
        model = get_pelt_model(make_base(), PREFIX)
        for _ in range(2):
            model(**make_batch(with_labels=False), output_attentions=True)
    finally:
        logger.removeHandler(handler)
    assert len(said) == 1 and "beside the kernels, which never make them" in said[0]


def test_weights_learn_as_outputs_do(make_base, make_batch, randomise):
    model = randomise(get_pelt_model(make_base(), PREFIX))
    weights = model(**make_batch(with_labels=False), output_attentions=True).attentions[1]
    weights[..., :P].sum().backward()
    assert model.prefix.down.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("gate", (0.0, 0.5, 1.0))
def test_the_output_is_weights_times_gated_values(gate):
    """The formula, a gate of 0 included: it leaves zero keys that take softmax mass."""
    draw = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, H, S, 32, generator=draw) for _ in range(3))
    prefix = Prefix(*(torch.randn(P, H, 32, generator=draw) for _ in range(2)))
    gates, mask = torch.full((2,), gate), torch.arange(S) < torch.tensor([[7], [0]])
    options = {"gate": gates, "key_mask": mask, "is_causal": True, "scale": 0.3}
    weights = attention_weights(q, k, (prefix,), **options)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, H, S))
    before = (gate * prefix.v).transpose(0, 1).expand(2, -1, -1, -1)
    found = weights @ torch.cat([before, v], dim=2)
    out = prefix_attention(q, k, v, (prefix,), **options, backend="eager")
    options["gate"], exact = gates.double(), Prefix(prefix.k.double(), prefix.v.double())
    q, k, v = q.double(), k.double(), v.double()
    truth = prefix_attention(q, k, v, (exact,), **options, backend="eager")
    assert_close(found, out, truth, torch.float32, "out")
    if gate == 0.0:
        torch.testing.assert_close(weights[1], torch.cat([torch.full((H, S, P), 1 / P),
                                                          torch.zeros(H, S, S)], -1))  # fmt: skip


def test_a_row_that_sees_nothing_is_zero():
    q = torch.randn(1, H, 3, 32)
    weights = attention_weights(q, q, key_mask=torch.zeros(1, 3, dtype=torch.bool))
    assert torch.equal(weights, torch.zeros(1, H, 3, 3))
