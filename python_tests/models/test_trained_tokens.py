"""Words that are trained alone: their rows learn, the table stays bit for bit what it was."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from every_method import LORA
from families import WRITERS, make_writer
from safetensors.torch import load_file
from torch import nn

from pelt_kernels.methods import BitFitConfig, CompositeConfig
from pelt_kernels.models import PeltModel, get_pelt_model

IDS = (98, 7, 60)
TOKENS = CompositeConfig(trainable_tokens=IDS)
WITH_LORA = CompositeConfig(trainable_tokens=IDS, lora=LORA)
TABLE = "bert.embeddings.word_embeddings.weight"


@pytest.fixture
def make_tied(make_base):
    """A language model of two layers whose head is tied to the word embeddings."""

    def make(dtype=torch.float32):
        torch.manual_seed(0)
        model = hf.BertForMaskedLM(make_base().config).to(dtype).eval()
        assert model.cls.predictions.decoder.weight is model.get_input_embeddings().weight
        return model

    return make


@pytest.fixture
def batch(make_batch):
    made = make_batch(with_labels=False)
    made["input_ids"][0, :4] = torch.tensor([7, 98, 60, 7])
    made["labels"] = made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)
    return made


def with_head(base, model):
    """The plain base model with the head of a tuned one."""
    trained = model.trained_parameters()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if f"base_model.{name}" in trained:
                parameter.copy_(trained[f"base_model.{name}"])
    return base


def with_rows(base, model):
    """The same with the rows of trained words in its table, too."""
    with torch.no_grad():
        table = base.get_input_embeddings().weight
        table[torch.tensor(sorted(IDS))] = model.tokens.weight.to(table.dtype)
    return with_head(base, model)


@pytest.mark.parametrize("family", ["bert", "distilbert", "electra"])
def test_the_rows_stand_for_the_tables_in_every_classifier(
    family, make_base, make_batch, randomise
):
    model = randomise(get_pelt_model(make_base(family), TOKENS))
    batch = make_batch(with_labels=False)
    batch["input_ids"][0, :4] = torch.tensor([7, 98, 60, 7])
    expected = with_rows(make_base(family), model)
    assert torch.equal(model(**batch).logits, expected(**batch).logits)


@pytest.mark.parametrize("family", WRITERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rows_stand_for_the_tables_in_models_that_write(family, dtype, randomise):
    """Input and tied head, scaled words (Gemma, BART) included; a head of its own stays."""
    scaled = {"scale_embedding": True} if "bart" in family else {}
    model = randomise(get_pelt_model(make_writer(family, **scaled).to(dtype), TOKENS))
    expected = with_rows(make_writer(family, **scaled).to(dtype), model).requires_grad_(False)
    ids = torch.tensor([[7, 98, 60, 7, 11, 12], [5, 60, 6, 8, 9, 98]])
    more = {"labels": ids[:, :4].clone()} if model.base_model.config.is_encoder_decoder else {}
    found, truth = model(ids, **more).logits, expected(ids, **more).logits
    allowed = 16 * torch.finfo(dtype).eps * truth.abs().max().item()
    torch.testing.assert_close(found, truth, rtol=0, atol=allowed)
    assert (truth - make_writer(family, **scaled).to(dtype)(ids, **more).logits).abs().max() > 0.2


def test_a_tied_head_reads_the_rows_and_gradients_are_those_of_the_whole_table(
    make_tied, batch, randomise
):
    model = randomise(get_pelt_model(make_tied(), TOKENS))
    expected = with_rows(make_tied(), model)
    found, truth = model(**batch), expected(**batch)
    torch.testing.assert_close(found.logits, truth.logits, rtol=0, atol=1e-6)
    found.loss.backward()
    truth.loss.backward()
    rows = expected.get_input_embeddings().weight.grad[sorted(IDS)]
    torch.testing.assert_close(model.tokens.weight.grad, rows, rtol=1e-5, atol=1e-7)
    assert model.base_model.get_input_embeddings().weight.grad is None and rows.any()


@pytest.mark.parametrize("config", [TOKENS, WITH_LORA], ids=["alone", "lora"])
def test_frozen_rows_are_bit_equal_after_training_and_no_optimizer_holds_the_table(
    config, make_tied, batch
):
    model = get_pelt_model(make_tied(), config).train()
    table = model.base_model.get_input_embeddings().weight
    before, rows = table.detach().clone(), model.tokens.weight.detach().clone()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert not any(parameter is table for parameter in trained)
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(table, before) and (model.tokens.weight != rows).any(1).all()
    held = {tuple(value.shape) for state in optimizer.state.values()
            for value in state.values() if value.ndim}  # fmt: skip
    assert (3, 32) in held and tuple(table.shape) not in held
    removed = model.remove()
    assert torch.equal(removed.get_input_embeddings().weight, before)
    assert torch.equal(removed(**batch).logits, make_tied()(**batch).logits)


def test_they_are_saved_loaded_resumed_and_left_out(make_tied, batch, randomise, tmp_path):
    model = randomise(get_pelt_model(make_tied(), WITH_LORA))
    plain, expected = with_head(make_tied(), model)(**batch).logits, model(**batch).logits
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "pelt_model.safetensors")["tokens.weight"].shape == (3, 32)
    again = PeltModel.from_pretrained(make_tied(), tmp_path)
    assert torch.equal(again(**batch).logits, expected)
    other = get_pelt_model(make_tied(), WITH_LORA).eval()
    assert "tokens.weight" in model.state_dict() and "tokens.ids" not in model.state_dict()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(**batch).logits, expected)
    assert torch.equal(copy.deepcopy(other)(**batch).logits, expected)
    with again.disable_adapter():
        assert torch.equal(again(**batch).logits, plain)
    assert torch.equal(again(**batch).logits, expected)
    dense = again.export_dense()
    torch.testing.assert_close(dense(**batch).logits, expected, rtol=0, atol=1e-5)
    rows = dense.get_input_embeddings().weight[sorted(IDS)]
    assert torch.equal(rows, model.tokens.weight)


def test_negative_ids_count_from_the_last(make_tied):
    model = get_pelt_model(make_tied(), CompositeConfig(trainable_tokens=(-1, -3, 4)))
    assert model.tokens.ids.tolist() == [4, 96, 98]


def test_sixteen_bit_tables_have_float32_rows(make_tied, batch, randomise):
    model = randomise(get_pelt_model(make_tied(torch.bfloat16), TOKENS), std=0.02)
    assert model.tokens.weight.dtype == torch.float32
    model(**batch).loss.backward()
    assert model.tokens.weight.grad.dtype == torch.float32 and model.tokens.weight.grad.any()
    dense = model(**batch).logits
    assert torch.equal(model.export_dense()(**batch).logits, dense)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(reentrant, make_tied, batch, randomise):
    model = randomise(get_pelt_model(make_tied(), WITH_LORA)).train()
    gradients = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(**batch).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.trained_parameters().items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_compiled_without_a_break_it_is_the_same(make_tied, batch, randomise):
    model = randomise(get_pelt_model(make_tied(), TOKENS))
    expected = model(**batch).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**batch).logits, expected, rtol=0, atol=1e-6)


def test_what_it_refuses(make_tied, batch):
    base = make_tied()
    for ids in ((99,), (-100,), (98, -1)):
        with pytest.raises(ValueError, match="expected trainable_tokens as different words of the"):
            get_pelt_model(base, CompositeConfig(trainable_tokens=ids))
    model = get_pelt_model(base, TOKENS)
    model.resize_token_embeddings(104)
    with pytest.raises(ValueError, match="expected the 99 words .* got 104; resize_token_embed"):
        model(**batch)

    class Doubled(nn.Embedding):
        def forward(self, words):
            return 2 * super().forward(words)

    other = make_tied()
    strange = Doubled(99, 32)
    strange.weight = other.get_input_embeddings().weight
    other.set_input_embeddings(strange)
    with pytest.raises(ValueError, match=r"got Doubled \(bert.embeddings.word_embeddings\)"):
        get_pelt_model(other, TOKENS)
    get_pelt_model(other, BitFitConfig())
