"""PEFT's prefix tuning on encoders, which it refuses; in a Trainer; compiled; and what stays as
PEFT made it.
"""

from __future__ import annotations

import peft
import pytest
import torch
import transformers as hf
from family_models import ENCODER, L, make_encoder, make_writer

import pelt_kernels
from pelt_kernels.integrations import peft_families, peft_prefix_attention
from pelt_kernels.methods import PrefixTuningConfig
from pelt_kernels.models import get_pelt_model
from pelt_kernels.ops.prefix_attention import without_prefix

# PEFT, and this, name things as transformers did before.
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated:FutureWarning")
P = 3
# PEFT cannot read these in its config.
READ = {"token_dim": 32, "num_attention_heads": 4, "num_layers": L}


def _with_prefix(model, task="SEQ_CLS", **changes):
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=P, **READ | changes)
    return peft.get_peft_model(model, config).to(model.dtype).eval()


def _gradients(model, out):
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    return model.prompt_encoder["default"].embedding.weight.grad


@pytest.mark.parametrize("family", peft_families.ENCODERS)
def test_encoders_are_those_of_this_project(family, batch):
    """With the positions of PEFT's cache, which begin at P, given to this project's model."""
    base = make_encoder(family)
    config = PrefixTuningConfig(prefix_length=P, mid=None)
    own = get_pelt_model(make_encoder(family), config).eval()
    model = _with_prefix(base)
    table = model.prompt_encoder["default"].embedding.weight
    with torch.no_grad():  # [P, L · 2 · G · E] -> [L, 2, P, G, E]
        rows = table.view(P, L, 2, 4, 8).permute(1, 2, 0, 3, 4)
        next(p for n, p in own.named_parameters() if n.endswith("table")).copy_(rows)
    with pytest.raises(ValueError, match="does not support past key values"):
        model(**batch)
    pelt_kernels.accelerate(model)
    out = model(**batch).logits
    shifted = {"position_ids": _positions(model, batch)}
    torch.testing.assert_close(out, own(**batch, **shifted).logits)
    expected = _gradients(model, out)
    table.grad = None
    model.train().gradient_checkpointing_enable()
    torch.testing.assert_close(_gradients(model, model(**batch).logits), expected)


def _positions(model, batch):
    """What the embeddings of a model take after P tokens of a cache."""
    embeddings = model.base_model.base_model.embeddings
    make = getattr(embeddings, "create_position_ids_from_input_ids", None)
    if make is None:
        return torch.arange(P, P + 7)[None]
    return make(batch["input_ids"], embeddings.padding_idx, P)


def test_an_encoder_is_the_formula(batch, monkeypatch):
    """softmax( Q [Pk ; K]ᵀ / √E ) [Pv ; V], joined and written out, in every layer."""
    model = _with_prefix(make_encoder("bert"))
    pelt_kernels.accelerate(model)
    found = model(**batch, token_type_ids=batch["attention_mask"]).logits
    table = model.prompt_encoder["default"].embedding.weight.view(P, 2 * L, 4, 8)
    rows = iter(table.unbind(1))

    def literal(module, q, k, v, mask, **kwargs):
        pk, pv = (next(rows).transpose(0, 1).expand(2, -1, -1, -1) for _ in range(2))
        scores = q @ torch.cat([pk, k], 2).transpose(-1, -2) / 8**0.5
        scores[..., P:].masked_fill_(~batch["attention_mask"].bool()[:, None, None], -torch.inf)
        return (scores.softmax(-1) @ torch.cat([pv, v], 2)).transpose(1, 2), None

    hf.AttentionInterface.register("literal", literal)
    base = model.base_model
    pelt_kernels.restore(model)
    base.config._attn_implementation = "literal"
    positions = torch.arange(P, P + 7)[None]
    expected = base(**batch, token_type_ids=batch["attention_mask"], position_ids=positions)
    torch.testing.assert_close(found, expected.logits)


def test_features_of_an_encoder_are_those_of_peft(batch):
    """The one kind of encoder that PEFT serves: it is where the positions come from."""
    model = _with_prefix(make_encoder("bert", hf.AutoModel), "FEATURE_EXTRACTION")
    expected = model(**batch).last_hidden_state
    wanted = _gradients(model, expected)
    model.zero_grad()
    pelt_kernels.accelerate(model)
    found = model(**batch).last_hidden_state
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(_gradients(model, found), wanted)


@pytest.mark.parametrize(
    "task, kind, name",
    [
        ("TOKEN_CLS", hf.AutoModelForTokenClassification, "logits"),
        ("QUESTION_ANS", hf.AutoModelForQuestionAnswering, "start_logits"),
    ],
)
def test_other_heads_of_an_encoder(task, kind, name, batch):
    """They read all that the model reads: the second sentence's type, positions."""
    model = _with_prefix(make_encoder("bert", kind), task)
    pelt_kernels.accelerate(model)
    types = {"token_type_ids": batch["attention_mask"]}
    positions = {"position_ids": torch.arange(7)[None]}
    found = model(**batch, **types)[name]
    torch.testing.assert_close(model(**batch, **types, **positions)[name], found)
    assert not torch.allclose(model(**batch)[name], found)
    labels = {"labels": batch["input_ids"] % 2}
    if task == "QUESTION_ANS":
        labels = {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    model(**batch, **labels).loss.backward()
    assert model.prompt_encoder["default"].embedding.weight.grad.abs().max() > 0


def test_a_trainer_with_gradient_checkpointing(tmp_path, batch):
    model = _with_prefix(make_encoder("bert").float())
    report = pelt_kernels.accelerate(model)
    assert report.count == 1
    row = {name: value[0] for name, value in batch.items()} | {"labels": 1}
    arguments = hf.TrainingArguments(
        tmp_path,
        max_steps=8,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        gradient_checkpointing=True,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
    )
    trainer = hf.Trainer(model, arguments, train_dataset=[row] * 4)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.2 * losses[0]
    trainer.save_model(tmp_path / "saved")
    opened = peft.PeftModel.from_pretrained(make_encoder("bert").float(), tmp_path / "saved")
    pelt_kernels.accelerate(opened)
    row = {name: value[:1] for name, value in batch.items()}
    torch.testing.assert_close(opened(**row).logits, model.eval()(**row).logits)


def test_a_compiled_training_step(batch):
    torch._dynamo.reset()
    model = _with_prefix(make_encoder("bert", num_hidden_layers=1).float(), num_layers=1)
    pelt_kernels.accelerate(model)
    model.train()
    expected = _gradients(model, model(**batch).logits)
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(_gradients(model, compiled(**batch).logits), expected)


def test_dropout_of_attention_is_that_of_the_model(batch, monkeypatch):
    """The prefix's columns included, and none outside of training."""
    rates = []

    def watched(*args, **kwargs):
        rates.append(kwargs["dropout_p"])
        return pelt_kernels.prefix_attention(*args, **kwargs)

    monkeypatch.setattr(peft_prefix_attention, "prefix_attention", watched)
    model = _with_prefix(make_encoder("bert", attention_probs_dropout_prob=0.25))
    pelt_kernels.accelerate(model)
    model(**batch)
    model.train()(**batch)
    assert rates == [0.0] * L + [0.25] * L


def _left_alone():
    gpt2 = {"vocab_size": 64, "n_embd": 32, "n_layer": L, "n_head": 4}
    writer = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": L}
    bert = {**ENCODER, "num_labels": 2}
    lm = {"task_type": "CAUSAL_LM", "num_virtual_tokens": P}
    prefix = {"num_virtual_tokens": P, **READ}
    return {
        "PROMPT_TUNING is not prefix tuning": (
            lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**gpt2)),
            peft.PromptTuningConfig(**lm),
        ),
        "P_TUNING is not prefix tuning": (
            lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**gpt2)),
            peft.PromptEncoderConfig(**lm),
        ),
        "PeftModel hands no prefix to its model": (
            lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**gpt2)),
            peft.PrefixTuningConfig(num_virtual_tokens=P),
        ),
        "the attention of mpnet does not go through": (
            lambda: hf.MPNetForSequenceClassification(hf.MPNetConfig(**bert)),
            peft.PrefixTuningConfig(task_type="SEQ_CLS", **prefix),
        ),
        "the attention of deberta-v2 does not go through": (
            lambda: hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**bert)),
            peft.PrefixTuningConfig(task_type="SEQ_CLS", **prefix),
        ),
        "gptj is not among the families": (
            lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**gpt2, rotary_dim=4)),
            peft.PrefixTuningConfig(**lm),
        ),
        "num_transformer_submodules is 1": (
            lambda: hf.T5ForConditionalGeneration(hf.T5Config(**writer)),
            peft.PrefixTuningConfig(
                task_type="SEQ_2_SEQ_LM", num_virtual_tokens=P, num_transformer_submodules=1
            ),
        ),
        f"num_layers is 1, and the model has {L} attentions": (
            lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**gpt2)),
            peft.PrefixTuningConfig(**lm, num_layers=1),
        ),
    }


@pytest.mark.parametrize("reason", list(_left_alone()))
def test_what_is_left_alone_is_named(reason):
    make, config = _left_alone()[reason]
    make_peft = peft.get_peft_model if config.task_type else peft.PeftModel
    model = make_peft(make(), config)
    kind, attention = type(model), model.base_model.config._attn_implementation
    report = pelt_kernels.accelerate(model)
    assert report.count == 0
    assert report.left_alone[kind.__name__].startswith(reason)
    assert type(model) is kind
    assert model.base_model.config._attn_implementation == attention


def test_a_backend_that_cannot_serve_changes_nothing():
    model = _with_prefix(make_encoder("bert").float())
    with pytest.raises(ValueError, match="prefix_attention: backend 'cuda' was asked for"):
        pelt_kernels.accelerate(model, backend="cuda")
    assert type(model) is peft.PeftModelForSequenceClassification
    assert model.base_model.config._attn_implementation == "sdpa"


def test_a_backend_is_asked_for_at_each_call(batch, monkeypatch):
    asked = []

    def watched(*args, **kwargs):
        asked.append(kwargs["backend"])
        return pelt_kernels.prefix_attention(*args, **kwargs)

    monkeypatch.setattr(peft_prefix_attention, "prefix_attention", watched)
    model = _with_prefix(make_encoder("bert").float())
    with pelt_kernels.accelerated(model, backend="eager"):
        model(**batch)
    assert asked == ["eager"] * L
    assert type(model) is peft.PeftModelForSequenceClassification


@pytest.mark.backend("cpu")
@pytest.mark.parametrize("backend", [None, "eager"])
def test_layers_without_a_prefix_are_the_kernels_too(backend, batch, monkeypatch):
    """Of an encoder beside the decoder that has prefixes, unless another backend is asked for."""
    monkeypatch.setattr(without_prefix, "PAYS_FROM", 0)
    model = _with_prefix(make_writer("bart").float(), "SEQ_2_SEQ_LM")
    batch = batch | {"labels": batch["input_ids"][:, :5].contiguous()}
    expected = model(**batch).logits
    wanted = _gradients(model, expected)
    model.zero_grad()
    pelt_kernels.ops.forget_choices()
    pelt_kernels.accelerate(model, backend=backend)
    found = model(**batch).logits
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(_gradients(model, found), wanted)
    plain = [c for c in pelt_kernels.explain("prefix_attention") if "P_i" not in c.call]
    assert {c.backend for c in plain} == ({"cpu"} if backend is None else set())
