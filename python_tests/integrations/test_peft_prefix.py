"""PEFT's prefix tuning, accelerated, against PEFT as shipped."""

from __future__ import annotations

import copy
import io
import pickle

import peft
import pytest
import torch
import transformers as hf
from closeness import assert_close
from family_models import L, make_decoder, make_writer

import pelt_kernels
from pelt_kernels.integrations import (
    peft_families,
    peft_prefix_attention,
    peft_prefix_model,
)

# PEFT, and this, name things as transformers did before.
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated:FutureWarning")
P = 3


def _with_prefix(model, task="CAUSAL_LM", **changes):
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=P, **changes)
    return peft.get_peft_model(model, config).to(model.dtype).eval()


def _run(model, batch, **kwargs):
    """The logits, and the gradients of all that is trained."""
    model.zero_grad()
    return _backward(model, model(**batch, **kwargs).logits)


def _backward(model, logits):
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach()} | grads


def _checkpointed(model, **kwargs):
    model.train().gradient_checkpointing_enable(**kwargs)
    return model


@pytest.fixture
def calls(monkeypatch):
    """A list with an entry for each call of `prefix_attention`."""
    made = []

    def counted(*args, **kwargs):
        made.append(1)
        return pelt_kernels.prefix_attention(*args, **kwargs)

    monkeypatch.setattr(peft_prefix_attention, "prefix_attention", counted)
    return made


@pytest.mark.parametrize("family", peft_families.DECODERS)
def test_decoders_are_those_of_peft(family, batch, calls):
    """Whose positions begin at P; with gradient checkpointing, where PEFT fails, too."""
    model = _with_prefix(make_decoder(family))
    expected, keys = _run(model, batch), list(model.state_dict())
    report = pelt_kernels.accelerate(model)
    assert report.served == {"prefix_attention": ("PeftModelForCausalLM",)}
    assert report.left_alone == {} and list(model.state_dict()) == keys
    torch.testing.assert_close(_run(model, batch), expected)
    assert len(calls) == L
    torch.testing.assert_close(_run(_checkpointed(model), batch), expected)
    assert len(calls) == 3 * L
    pelt_kernels.restore(model)
    model.eval().gradient_checkpointing_disable()
    assert type(model) is peft.PeftModelForCausalLM
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(_run(model, batch), expected)
    assert len(calls) == 3 * L


@pytest.mark.parametrize("family", peft_families.WRITERS)
def test_writers_are_those_of_peft(family, batch, calls):
    """The decoder's attention has the prefix, T5's with positions of its own, as in PEFT's cache;
    a layer's is the one that PEFT's cache gives it.
    """
    labels, seen = batch["input_ids"][:, :5].contiguous(), batch["attention_mask"][:, 1:6].flip(1)
    batch = batch | {"labels": labels, "decoder_attention_mask": seen}
    options = {"prefix_projection": True, "encoder_hidden_size": 8} if family == "t5" else {}
    model = _with_prefix(make_writer(family), "SEQ_2_SEQ_LM", **options)
    expected = _run(model, batch)
    pelt_kernels.accelerate(model)
    torch.testing.assert_close(_run(model, batch), expected)
    assert len(calls) == L
    torch.testing.assert_close(_run(_checkpointed(model), batch), expected)


HEADS = [
    ("SEQ_CLS", hf.AutoModelForSequenceClassification),
    ("TOKEN_CLS", hf.AutoModelForTokenClassification),
    ("QUESTION_ANS", hf.AutoModelForQuestionAnswering),
]


@pytest.mark.parametrize("task, kind", HEADS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_heads_are_the_models_own_on_pefts_cache(family, task, kind, batch):
    """PEFT finds no argument for its cache in these models; what it means is computed here."""
    model = _with_prefix(make_decoder(family, kind), task)
    seen = torch.cat([torch.ones(2, P), batch["attention_mask"]], 1)
    name = "start_logits" if task == "QUESTION_ANS" else "logits"
    cache = {model_argument(model): model.get_prompt(2), "use_cache": False}
    out = model.base_model(input_ids=batch["input_ids"], attention_mask=seen, **cache)
    expected = _backward(model, out[name])
    pelt_kernels.accelerate(model)
    model.zero_grad()
    torch.testing.assert_close(_backward(model, model(**batch)[name]), expected)


def model_argument(model):
    return peft_prefix_model.cache_argument(model.base_model)


def test_features_are_those_of_peft(batch):
    model = _with_prefix(make_decoder("gpt2", hf.AutoModel), "FEATURE_EXTRACTION")
    expected = model(**batch).last_hidden_state
    pelt_kernels.accelerate(model)
    torch.testing.assert_close(model(**batch).last_hidden_state, expected)


@pytest.mark.parametrize("is_reentrant", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_reparametrised_prefix(family, is_reentrant, batch):
    model = _with_prefix(make_decoder(family), prefix_projection=True, encoder_hidden_size=8)
    expected = _run(model, batch)
    pelt_kernels.accelerate(model)
    torch.testing.assert_close(_run(model, batch), expected)
    model.enable_input_require_grads()
    _checkpointed(model, gradient_checkpointing_kwargs={"use_reentrant": is_reentrant})
    torch.testing.assert_close(_run(model, batch), expected)


def test_without_a_mask_or_with_positions_or_embeddings(batch):
    model, ids = _with_prefix(make_decoder("llama")), batch["input_ids"]
    inputs = [
        {"input_ids": ids},
        {"input_ids": ids, "position_ids": torch.arange(7)[None] + 2},
        {"inputs_embeds": model.get_input_embeddings()(ids)},
    ]
    expected = [model(**each).logits for each in inputs]
    pelt_kernels.accelerate(model)
    for each, logits in zip(inputs, expected):
        torch.testing.assert_close(model(**each).logits, logits)


def test_a_backward_after_another_adapter_was_chosen(batch):
    """A layer that is computed again has the prefix of its own forward."""

    def run():
        model.zero_grad()
        for parameter in model.prompt_encoder.parameters():
            parameter.requires_grad_()
        loss = 0.0
        for name, factor in (("default", 1), ("long", 2)):
            model.set_adapter(name)
            for parameter in model.prompt_encoder.parameters():
                parameter.requires_grad_()
            loss = loss + factor * model(**batch, labels=batch["input_ids"]).loss
        with model.disable_adapter():
            plain = model(**batch).logits
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach(), "plain": plain} | grads

    model = _with_prefix(make_decoder("gpt2"))
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P + 2)
    model.add_adapter("long", config)
    model.double()
    expected = run()
    assert sum("prompt_encoder" in name for name in expected) == 2
    pelt_kernels.accelerate(model)
    torch.testing.assert_close(run(), expected)
    torch.testing.assert_close(run(), expected)
    _checkpointed(model)
    torch.testing.assert_close(run(), expected)
    pelt_kernels.restore(model)
    model.eval().gradient_checkpointing_disable()
    torch.testing.assert_close(run(), expected)
    assert type(model) is peft.PeftModelForCausalLM


def test_a_float32_prefix_beside_a_bfloat16_model(batch):
    def made(dtype):
        model = peft.get_peft_model(
            make_decoder("llama").to(dtype),
            peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=P),
        )
        with torch.no_grad():
            table = model.prompt_encoder["default"].embedding.weight
            table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(2)))
        return model

    model, exact = made(torch.bfloat16), made(torch.float64).double()
    for own, other in zip(model.base_model.parameters(), exact.base_model.parameters()):
        other.data.copy_(own.data)
    truth, baseline = _run(exact, batch), _run(model, batch)
    pelt_kernels.accelerate(model)
    found = _run(model, batch)
    assert found["prompt_encoder.default.embedding.weight"].dtype is torch.float32
    for name, value in found.items():
        assert_close(value, baseline[name], truth[name], torch.bfloat16, name)


def _log_probabilities(model, batch, written):
    """Of what was written, by one forward of the whole text: log p of each new token [B, new]."""
    new = written.shape[1] - (1 if model.config.is_encoder_decoder else 7)
    seen = torch.cat([batch["attention_mask"], torch.ones(2, new, dtype=torch.long)], 1)
    texts = {"input_ids": written, "attention_mask": seen}
    texts["position_ids"] = (seen.cumsum(1) - 1).clamp(min=0)
    if model.config.is_encoder_decoder:
        texts = batch | {"decoder_input_ids": written}
    scores = model(**texts).logits[:, -new - 1 : -1].log_softmax(-1)
    return scores, scores.gather(2, written[:, -new:, None])[..., 0]


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "bart", "t5"])
def test_generation_is_what_the_forwards_say(family, batch):
    """Greedy it writes the likeliest token at each step, and of beams it knows the scores. PEFT's
    own prefix does not reach the model where transformers has another name for the cache.
    """
    is_writer = family in peft_families.WRITERS
    model = make_writer(family) if is_writer else make_decoder(family)
    model = _with_prefix(model, "SEQ_2_SEQ_LM" if is_writer else "CAUSAL_LM")
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    report = pelt_kernels.accelerate(model)
    assert report.count == 1
    written = model.generate(**batch, max_new_tokens=6, do_sample=False)
    scores, _ = _log_probabilities(model, batch, written)
    assert torch.equal(scores.argmax(-1), written[:, -6:])
    with model.disable_adapter():
        plain = model.base_model.generate(**batch, max_new_tokens=6, do_sample=False)
    assert not torch.equal(plain, written)
    options = {"return_dict_in_generate": True, "output_scores": True, "length_penalty": 0.0}
    beams = model.generate(**batch, **options, max_new_tokens=6, num_beams=3, do_sample=False)
    _, chosen = _log_probabilities(model, batch, beams.sequences)
    torch.testing.assert_close(chosen.sum(1), beams.sequences_scores.double(), rtol=1e-5, atol=1e-5)


def test_copies_and_files(batch, tmp_path):
    model = _with_prefix(make_decoder("gpt2").float())
    model.save_pretrained(tmp_path / "before")
    pelt_kernels.accelerate(model)
    model.save_pretrained(tmp_path / "after")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        before, after = (tmp_path / when / name for when in ("before", "after"))
        assert before.read_bytes() == after.read_bytes()
    expected, file = _run(model, batch), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    copies.append(torch.load(file, weights_only=False))
    for each in copies:
        assert type(each) is peft_prefix_model.AcceleratedPrefixCausalLM
        torch.testing.assert_close(_run(each, batch), expected, rtol=0, atol=0)
        pelt_kernels.restore(each)
        assert each.base_model.config._attn_implementation == "sdpa"
        torch.testing.assert_close(_run(each, batch), expected)
    assert type(model) is peft_prefix_model.AcceleratedPrefixCausalLM
    assert model.base_model.config._attn_implementation == "pelt_prefix_sdpa"
    opened = peft.PeftModel.from_pretrained(make_decoder("gpt2").float(), tmp_path / "after")
    pelt_kernels.accelerate(opened)
    assert torch.equal(opened(**batch).logits, expected["logits"])


def test_a_saved_reparametrisation_is_read_as_the_table_it_gave(batch, tmp_path):
    model = _with_prefix(make_decoder("llama").float(), prefix_projection=True)
    pelt_kernels.accelerate(model)
    model.save_pretrained(tmp_path)
    opened = peft.PeftModel.from_pretrained(make_decoder("llama").float(), tmp_path)
    pelt_kernels.accelerate(opened)
    torch.testing.assert_close(opened(**batch).logits, model(**batch).logits)


def test_weights_and_caches_are_given_where_they_are_asked_for(batch, calls):
    model = _with_prefix(make_decoder("gpt2", attn_implementation="eager"))
    expected = model(**batch, output_attentions=True)
    pelt_kernels.accelerate(model)
    found = model(**batch, output_attentions=True)
    assert len(calls) == L and found.past_key_values is None
    torch.testing.assert_close(found.attentions, expected.attentions)
    assert model(**batch, use_cache=True).past_key_values.get_seq_length() == P + 7
    assert len(calls) == L


def test_a_window_that_hides_keys_is_pefts(batch, calls):
    model = _with_prefix(make_decoder("mistral", sliding_window=P + 6))
    short = {name: value[:, :6] for name, value in batch.items()}
    expected = [model(**each).logits for each in (batch, short)]
    report = pelt_kernels.accelerate(model)
    assert f"with more than {P + 6} keys" in report.exceptions["PeftModelForCausalLM"]
    torch.testing.assert_close([model(**each).logits for each in (batch, short)], expected)
    assert len(calls) == L
