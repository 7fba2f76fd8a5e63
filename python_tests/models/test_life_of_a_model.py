"""Putting a method in, switching it off, taking it out; and what is refused with one sentence."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading

import pytest
import torch
import transformers as hf
from every_method import COMPOSITES

from pelt_kernels.methods import (
    BitFitConfig,
    BottleneckAdapterConfig,
    FullConfig,
    HeadConfig,
    LoraConfig,
    PrefixTuningConfig,
    UniPELTConfig,
)
from pelt_kernels.models import PeltModel, get_pelt_model

APL = UniPELTConfig(
    adapter=BottleneckAdapterConfig(bottleneck=4),
    prefix=PrefixTuningConfig(prefix_length=3, mid=8),
    lora=LoraConfig(r=4),
)
METHODS = {
    "unipelt": APL,
    "adapter": APL.adapter,
    "prefix": APL.prefix,
    "lora": APL.lora,
    "bitfit": BitFitConfig(),
    "head": HeadConfig(),
    **COMPOSITES,
}


def anatomy(model):
    """Everything that must be as it was: modules, hooks, flags, configuration objects, weights."""
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in model.named_modules()
        },
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "config": id(model.config),
        "attention": model.config._attn_implementation,
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
    }


def same(one, other):
    weights, others = one.pop("weights"), other.pop("weights")
    assert one == other
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        assert torch.equal(value, others[name]), name


def train_a_little(model, batch):
    model.train()
    optimizer = torch.optim.AdamW(model.trained_parameters().values(), lr=1e-2)
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra"])
@pytest.mark.parametrize("method", METHODS)
def test_remove_gives_back_the_base_model_bit_for_bit(
    method, family, attention, make_base, make_batch
):
    base, batch = make_base(family, attention=attention), make_batch()
    next(base.parameters()).requires_grad_(False)
    before, logits = anatomy(base), base(**batch).logits
    model = get_pelt_model(base, METHODS[method])
    train_a_little(model, batch)
    assert not torch.equal(model(**batch).logits, logits)
    given = model.remove()
    assert given is base
    assert torch.equal(base(**batch).logits, logits)
    same(before, anatomy(base))
    again = get_pelt_model(base, METHODS[method])
    again(**batch).loss.backward()


def test_remove_can_leave_the_trained_head(make_base, make_batch):
    base, batch = make_base(), make_batch()
    first = base.classifier.weight.detach().clone()
    model = get_pelt_model(base, APL)
    train_a_little(model, batch)
    trained = base.classifier.weight.detach().clone()
    model.remove(keep_head=True)
    assert torch.equal(base.classifier.weight, trained) and not torch.equal(trained, first)


@pytest.mark.parametrize("method", METHODS)
def test_disabled_it_is_the_base_model_with_the_trained_head(method, make_base, make_batch):
    base, batch = make_base(), make_batch()
    encoder = copy.deepcopy(base.bert)
    model = get_pelt_model(base, METHODS[method])
    train_a_little(model, batch)
    enabled = model(**batch).logits
    with torch.no_grad():
        pooled = encoder(batch["input_ids"], batch["attention_mask"]).pooler_output
        expected = torch.nn.functional.linear(pooled, base.classifier.weight, base.classifier.bias)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)
        with model.disable_adapter():
            assert torch.equal(model(**batch).logits, expected)
        assert torch.equal(model(**batch).logits, expected)
        with pytest.raises(ValueError, match="save_pretrained: expected the method to be in"):
            model.save_pretrained("nowhere")
    assert torch.equal(model(**batch).logits, enabled)
    with pytest.raises(KeyError, match="inside"), model.disable_adapter():
        raise KeyError("inside")
    assert torch.equal(model(**batch).logits, enabled)


def test_full_fine_tuning_has_no_base_to_go_back_to(make_base):
    model = get_pelt_model(make_base(), FullConfig())
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(ValueError, match="'full', which trains it in place"):
        model.remove()
    with (
        pytest.raises(ValueError, match="'full', which trains it in place"),
        model.disable_adapter(),
    ):
        pass


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_is_independent(method, make_base, make_batch, randomise):
    model = randomise(get_pelt_model(make_base(), METHODS[method]))
    batch = make_batch()
    logits = model(**batch).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**batch).logits, logits)
    mine, others = ({id(p) for p in m.parameters()} for m in (model, twin))
    assert not mine & others
    train_a_little(twin, batch)
    assert torch.equal(model(**batch).logits, logits)
    trained = twin(**batch).logits
    assert not torch.equal(trained, logits)
    model.remove()
    assert torch.equal(twin(**batch).logits, trained)
    twin.remove()


def test_a_pickle_serves_in_another_process(make_base, make_batch, randomise, tmp_path):
    model, batch = randomise(get_pelt_model(make_base(), APL)), make_batch(with_labels=False)
    torch.save([model, batch], tmp_path / "model.pt")
    code = (
        f"import torch; torch.set_num_threads({torch.get_num_threads()})\n"
        f"model, batch = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        f"torch.save(model(**batch).logits, {str(tmp_path / 'logits.pt')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(**batch).logits)


def test_a_model_built_from_the_same_config_object_is_not_touched(make_base, make_batch):
    base = make_base()
    other = hf.BertForSequenceClassification(base.config).eval()
    batch = make_batch()
    logits = other(**batch).logits
    model = get_pelt_model(base, APL)
    assert base.bert.config._attn_implementation == "pelt"
    assert model.config._attn_implementation == base.config._attn_implementation == "sdpa"
    assert torch.equal(other(**batch).logits, logits)
    assert other.config._attn_implementation == "sdpa"


def test_threads_do_not_mix_their_sentences(make_base, make_batch, randomise):
    model = randomise(get_pelt_model(make_base(), APL))
    batches = [
        make_batch(lengths, with_labels=False) for lengths in ((9, 4), (3, 8), (6, 11), (5, 5))
    ]
    with torch.no_grad():
        expected = [model(**batch).logits for batch in batches]
        wrong = []

        def serve(i):
            for _ in range(15):
                with torch.no_grad():
                    if not torch.equal(model(**batches[i]).logits, expected[i]):
                        wrong.append(i)

        threads = [threading.Thread(target=serve, args=(i,)) for i in range(len(batches))]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert wrong == []


@pytest.mark.parametrize(
    ("model_class", "head"),
    [
        (hf.BertForTokenClassification, {"classifier.weight", "classifier.bias"}),
        (hf.BertForQuestionAnswering, {"qa_outputs.weight", "qa_outputs.bias"}),
        (hf.BertModel, set()),
    ],
)
def test_other_heads_and_none(model_class, head, make_base, make_batch):
    base = model_class(make_base(num_labels=2).config).eval()
    model = get_pelt_model(base, APL)
    mine = {name.removeprefix("base_model.") for name in model.trained_parameters()}
    assert {name for name in mine if name in dict(base.named_parameters())} >= head
    untouched = dict(make_base().named_parameters())
    assert {name for name in mine if name.startswith("bert.") and name in untouched} == set()
    batch = make_batch(with_labels=False)
    out = model(**batch)
    assert torch.isfinite(out[0]).all()


def test_a_tied_decoder_belongs_to_the_encoder(make_base, make_batch):
    base = hf.BertForMaskedLM(make_base().config)
    model = get_pelt_model(base, HeadConfig())
    names = set(model.trained_parameters())
    assert "base_model.cls.predictions.transform.dense.weight" in names
    assert not base.bert.embeddings.word_embeddings.weight.requires_grad


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra"])
def test_the_head_is_everything_outside_the_encoder(family, make_base):
    base = make_base(family)
    outside = {
        f"base_model.{name}"
        for name, _ in base.named_parameters()
        if not name.startswith(base.base_model_prefix + ".")
    }
    assert len(outside) >= 2
    assert set(get_pelt_model(base, HeadConfig()).trained_parameters()) == outside


def test_bitfit_trains_every_bias_and_the_head(make_base):
    base = make_base()
    names = {f"base_model.{name}" for name, _ in base.named_parameters()}
    expected = {name for name in names if "bias" in name or "classifier" in name}
    assert set(get_pelt_model(base, BitFitConfig()).trained_parameters()) == expected


def test_attributes_come_from_the_base_model(make_base):
    base = make_base()
    model = get_pelt_model(base, APL)
    assert model.config is base.config and model.num_labels == 3
    assert model.device == torch.device("cpu") and model.dtype == torch.float32
    assert model.get_input_embeddings() is base.bert.embeddings.word_embeddings
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.no_such_thing
    assert model.eval().training is False and base.training is False
    assert model.train().training is base.training is True


def test_weights_of_an_adapted_linear_are_the_base_models(make_base):
    base = make_base()
    query = base.bert.encoder.layer[0].attention.self.query
    keys = set(base.state_dict())
    model = get_pelt_model(base, APL)
    adapted = base.bert.encoder.layer[0].attention.self.query
    assert adapted is not query and adapted.weight is query.weight and adapted.bias is query.bias
    assert keys <= set(base.state_dict())
    model.double()
    model.remove()
    assert base.bert.encoder.layer[0].attention.self.query is query
    assert query.weight.dtype == torch.float64


def test_what_is_refused(make_base, make_batch):
    def refuse(model, config, match, error=ValueError):
        with pytest.raises(error, match=match) as raised:
            get_pelt_model(model, config)
        assert "\n" not in str(raised.value)

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    neox = hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**sizes, intermediate_size=32))
    refuse(neox, APL, r"families albert, .*got GPTNeoXForCausalLM \(model_type 'gpt_neox'\)")
    refuse(torch.nn.Linear(2, 2), APL, "got Linear")
    refuse(hf.BertModel(make_base().config), HeadConfig(), "expected a model with a head")
    refuse(make_base(), {"method": "unipelt"}, "got dict", TypeError)
    refuse(get_pelt_model(make_base(), APL), APL, "has a method in it; remove")
    refuse(make_base(chunk_size_feed_forward=4), APL, "chunk_size_feed_forward=0 with a gate")
    refuse(make_base(), BottleneckAdapterConfig(reduction_factor=64), "hidden size 32, got 64")
    refuse(make_base(), PrefixTuningConfig(skip_layers=(2,)), r"2 layers \(0 to 1\), got \[2\]")
    refuse(make_base(), PrefixTuningConfig(skip_layers=(0, 1)), r"got \[0, 1\]")
    base = make_base()
    taken = get_pelt_model(base, LoraConfig())
    refuse(base, APL, "has a method in it")
    taken.remove()
    get_pelt_model(base, APL)


def test_chunks_are_fine_without_gates_there(make_base, make_batch, randomise):
    batch = make_batch(with_labels=False)
    config = UniPELTConfig(adapter=BottleneckAdapterConfig(bottleneck=4, gated=False))
    whole = randomise(get_pelt_model(make_base(), config))(**batch).logits
    chunked = randomise(get_pelt_model(make_base(chunk_size_feed_forward=3), config))
    torch.testing.assert_close(chunked(**batch).logits, whole, rtol=0, atol=1e-6)


def test_dense_masks_are_refused(make_base, make_batch):
    base, batch = make_base(attention="eager"), make_batch(with_labels=False)
    model = get_pelt_model(base, APL.prefix)
    dense = torch.ones(3, 1, 9, 9, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"expected attention_mask \[B, N\].*got \[3, 1, 9, 9\]"):
        model(input_ids=batch["input_ids"], attention_mask=dense)
    assert model(**batch, output_hidden_states=True).hidden_states[-1].shape == (3, 9, 32)


def test_an_attention_changed_afterwards_is_refused_and_not_ignored(make_base, make_batch):
    model = get_pelt_model(make_base(), APL.prefix)
    model.base_model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="was changed afterwards"):
        model(**make_batch())


def test_pelt_attention_cannot_be_chosen_by_hand(make_base, make_batch):
    get_pelt_model(make_base(), APL)
    other = make_base()
    other.set_attn_implementation("pelt")
    with pytest.raises(ValueError, match="prepared by get_pelt_model"):
        other(**make_batch())


def test_from_pretrained_is_a_pelt_model(make_base, tmp_path):
    get_pelt_model(make_base(), APL).save_pretrained(tmp_path)
    model = PeltModel.from_pretrained(make_base().train(), tmp_path)
    assert isinstance(model, PeltModel) and not model.training
