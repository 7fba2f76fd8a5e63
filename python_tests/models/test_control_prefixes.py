"""Control Prefixes in T5, BART and GPT-2: labels choose the prefixes, with and without a checkpoint,
a file, a Trainer; and what is refused before anything runs.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle

import pytest
import torch
import transformers as hf
from language_models import FAMILIES, make_language_model, make_pairs
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from pelt_kernels.methods import CompositeConfig, ControlPrefixesConfig, LoraConfig
from pelt_kernels.models import PeltModel, get_pelt_model
from pelt_kernels.training.encode import condition_tensors

CONTROL = ControlPrefixesConfig(
    prefix_length=3, mid=8, attributes={"source": 3, "cat": 4}, lengths={"cat": 1}
)
ATTRIBUTES = {"source": torch.tensor([2, 0, 1]), "cat": torch.tensor([3, 3, 0])}
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def make(randomise):
    """A family's tiny model with prefixes that matter."""

    def make(family, config=CONTROL, **changes):
        return randomise(get_pelt_model(make_language_model(family, **changes), config))

    return make


def sets_of(model):
    return [m for m in model.modules() if hasattr(m, "attributes") and hasattr(m, "segments")]


@every_family
def test_every_attention_has_its_own_prefixes(family, make):
    model = make(family)
    kinds = {"t5": 3, "bart": 3, "gpt2": 1}[family]
    assert len(sets_of(model)) == kinds
    for prefixes in sets_of(model):
        assert prefixes.attributes == {"source": (3, 2), "cat": (4, 1)}
        assert prefixes.start == "torch" and prefixes.num_layers == 2
    names = {name.split(".")[1] for name in model.trained_parameters()}
    assert kinds == 1 or names == {"encoder", "decoder", "cross"}


@every_family
def test_a_batch_is_its_sentences_one_by_one(family, make):
    model, batch = make(family), make_pairs(family)
    logits = model(**batch, attributes=ATTRIBUTES).logits
    for b in range(3):
        one = {name: value[b : b + 1] for name, value in batch.items()}
        labels = {name: value[b : b + 1] for name, value in ATTRIBUTES.items()}
        alone = model(**one, attributes=labels).logits
        torch.testing.assert_close(alone[0], logits[b], rtol=0, atol=2e-5)


@every_family
@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_label_changes_its_own_sentence_and_no_other(family, name, make):
    model, batch = make(family), make_pairs(family)
    logits = model(**batch, attributes=ATTRIBUTES).logits
    changed = {**ATTRIBUTES, name: ATTRIBUTES[name].clone()}
    changed[name][1] = (changed[name][1] + 1) % 3
    other = model(**batch, attributes=changed).logits
    assert torch.equal(other[[0, 2]], logits[[0, 2]])
    assert (other[1] - logits[1]).abs().max() > 1e-3


@every_family
def test_a_layer_can_go_without_in_one_kind_of_attention(family, make):
    config = dataclasses.replace(CONTROL, skip_encoder=(0,), skip_decoder=(1,), skip_cross=(0, 1))
    if family == "gpt2":
        config = dataclasses.replace(CONTROL, skip_decoder=(1,))
    model = make(family, config)
    assert [prefixes.num_layers for prefixes in sets_of(model)] == [1] * (1 + (family != "gpt2"))
    model(**make_pairs(family), attributes=ATTRIBUTES)


@every_family
def test_a_collapsed_prefix_gives_the_same_logits(family, make, tmp_path):
    model, batch = make(family), make_pairs(family)
    expected = model(**batch, attributes=ATTRIBUTES).logits
    model.save_pretrained(tmp_path, collapse_prefix=True)
    again = PeltModel.from_pretrained(make_language_model(family), tmp_path)
    assert all(prefixes.is_collapsed for prefixes in sets_of(again))
    found = again(**batch, attributes=ATTRIBUTES).logits
    assert torch.equal(found, expected)
    model.collapse_prefix()
    assert torch.equal(model(**batch, attributes=ATTRIBUTES).logits, expected)
    assert set(model.trained_parameters()) == set(again.trained_parameters())


@every_family
def test_it_is_saved_loaded_copied_and_left_out(family, make, tmp_path):
    config = dataclasses.replace(CONTROL, trainable_tokens=(-1, 5), unseen={"cat": 1})
    model, batch = make(family, config), make_pairs(family)
    batch["input_ids"][0, -3] = 5
    expected = model(**batch, attributes=ATTRIBUTES).logits
    # As a model with a method is: the attention of others may be another kernel.
    plain = make_language_model(family).requires_grad_(False)(**batch).logits
    model.save_pretrained(tmp_path)
    again = PeltModel.from_pretrained(make_language_model(family), tmp_path, is_trainable=True)
    assert again.method_config == config and again.tokens.weight.requires_grad
    other = get_pelt_model(make_language_model(family), config).eval()
    other.load_state_dict(model.state_dict())
    copies = [again.eval(), other, copy.deepcopy(other), pickle.loads(pickle.dumps(other))]
    for one in copies:
        assert torch.equal(one(**batch, attributes=ATTRIBUTES).logits, expected)
    with again.disable_adapter():
        assert torch.equal(again(**batch, attributes=ATTRIBUTES).logits, plain)
        assert torch.equal(again(**batch).logits, plain)
    assert torch.equal(again.remove().requires_grad_(False)(**batch).logits, plain)


@every_family
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_with_labels_gives_equal_gradients(family, reentrant, make):
    model, batch = make(family).train(), make_pairs(family)
    gradients = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(**batch, attributes=ATTRIBUTES, use_cache=False).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.trained_parameters().items()})
    assert all(gradient.any() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@every_family
def test_frozen_vocabulary_rows_are_bit_equal_after_training_steps(family, make):
    config = dataclasses.replace(CONTROL, trainable_tokens=(4, 5))
    model, batch = make(family, config).train(), make_pairs(family)
    batch["input_ids"][0, -3:] = torch.tensor([4, 5, 4])
    base = {n: p.detach().clone() for n, p in model.base_model.named_parameters()}
    rows = model.tokens.weight.detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch, attributes=ATTRIBUTES).loss.backward()
        optimizer.step()
    assert (model.tokens.weight != rows).any(1).all()
    for name, parameter in model.base_model.named_parameters():
        assert torch.equal(parameter, base[name]), name
    shapes = {value.shape for state in optimizer.state.values() for value in state.values()}
    assert model.base_model.get_input_embeddings().weight.shape not in shapes


@every_family
def test_beside_other_parts(family, make):
    config = CompositeConfig(prefix=CONTROL, lora=LoraConfig(r=2), bitfit=family != "t5")
    model = make(family, config)
    model(**make_pairs(family), attributes=ATTRIBUTES).loss.backward()
    assert all(p.grad is not None for p in model.trained_parameters().values())


def test_compiled_without_a_break_it_is_the_same(make):
    model, batch = make("gpt2"), make_pairs("gpt2")
    del batch["attention_mask"], batch["labels"]
    expected = model(**batch, attributes=ATTRIBUTES).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(**batch, attributes=ATTRIBUTES).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


class Pairs(torch.utils.data.Dataset):
    def __init__(self, family):
        self.batch = make_pairs(family)

    def __len__(self):
        return 3

    def __getitem__(self, i):
        row = {name: value[i] for name, value in self.batch.items()}
        return row | {"attributes": {n: int(v[i]) for n, v in ATTRIBUTES.items()}, "other": 1}


def collate(rows):
    plain = [{n: v for n, v in row.items() if n != "attributes"} for row in rows]
    return default_data_collator(plain) | condition_tensors(rows)


@pytest.mark.parametrize("family", ["t5", "gpt2"])
def test_a_trainer_takes_attributes_as_a_column_and_resumes(family, make, tmp_path):
    def train(steps, resume=None):
        options = TrainingArguments(
            str(tmp_path), max_steps=steps, save_steps=2, per_device_train_batch_size=2, seed=0,
            report_to=[], use_cpu=True, learning_rate=1e-2,
            disable_tqdm=True, logging_strategy="no", lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = Trainer(make(family), options, collate, Pairs(family))
        trainer._set_signature_columns_if_needed()
        assert "attributes" in trainer._signature_columns
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = train(4).model.state_dict()
    assert any((value != make(family).state_dict()[name]).any() for name, value in whole.items())
    resumed = train(4, str(tmp_path / "checkpoint-2")).model.state_dict()
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def test_a_trainer_that_generates_takes_attributes_too(make, tmp_path):
    model = make("t5")
    options = Seq2SeqTrainingArguments(
        str(tmp_path), per_device_eval_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True,
        predict_with_generate=True, generation_max_length=6, generation_num_beams=2,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(model, options, collate, eval_dataset=Pairs("t5"))
    written = torch.tensor(trainer.predict(Pairs("t5")).predictions)
    batch = make_pairs("t5")
    asked = {"attention_mask": batch["attention_mask"], "attributes": ATTRIBUTES, "num_beams": 2}
    expected = model.generate(batch["input_ids"], max_length=6, **asked)
    assert torch.equal(written[:, : expected.shape[1]], expected)


@every_family
@pytest.mark.parametrize("is_autocast", [False, True])
def test_sixteen_bits(family, is_autocast, make, randomise):
    exact, batch = make(family), make_pairs(family)
    if is_autocast:
        half = make(family)
    else:
        base = make_language_model(family, torch.bfloat16)
        half = randomise(get_pelt_model(base, CONTROL))
        assert next(iter(half.trained_parameters().values())).dtype == torch.float32
    truth = exact(**batch, attributes=ATTRIBUTES)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        found = half(**batch, attributes=ATTRIBUTES)
    found.loss.backward()
    truth.loss.backward()
    assert abs(found.loss - truth.loss) < 0.05
    for name, parameter in exact.trained_parameters().items():
        gradient = half.trained_parameters()[name].grad
        distance = (gradient - parameter.grad).norm() / (parameter.grad.norm() + 1e-3)
        assert distance < 0.25, f"{name}: {distance}"


def test_the_signature_has_attributes_only_where_there_are_some(make):
    base = hf.GPT2LMHeadModel
    with_some, without = make("gpt2"), make("gpt2", ControlPrefixesConfig(prefix_length=2, mid=4))
    shown = inspect.signature(with_some.forward).parameters
    assert shown["attributes"].kind is inspect.Parameter.KEYWORD_ONLY
    plain = [name for name in inspect.signature(base.forward).parameters if name != "self"]
    assert [name for name in shown if name != "attributes"] == plain
    assert list(inspect.signature(without.forward).parameters) == plain
    assert isinstance(with_some, PeltModel) and isinstance(without, PeltModel)


AS = "as {'source': int64 .B. from 0 to 2, 'cat': int64 .B. from 0 to 3}, got"
REFUSED = {
    f"{AS} none": None,
    f"{AS} source$": {"source": ATTRIBUTES["source"]},
    f"{AS} source, cat, x": {**ATTRIBUTES, "x": ATTRIBUTES["cat"]},
    f"{AS} Tensor": ATTRIBUTES["cat"],
    r"attributes\['cat'\] as a tensor int64 \[B\], got list": {**ATTRIBUTES, "cat": [1, 2, 3]},
    r"\['cat'\] int64 \[3\], one label for each sentence, got \[2\] int64": {
        **ATTRIBUTES,
        "cat": torch.tensor([1, 2]),
    },
    r"\['cat'\] int64 \[3\], .* got \[3, 1\] int64": {
        **ATTRIBUTES,
        "cat": ATTRIBUTES["cat"][:, None],
    },
    r"\['cat'\] int64 \[3\], .* got \[3\] int32": {**ATTRIBUTES, "cat": ATTRIBUTES["cat"].int()},
    r"\['cat'\] from 0 to 3, got 4": {**ATTRIBUTES, "cat": torch.tensor([0, 4, 5])},
    r"\['source'\] from 0 to 2, got -1": {**ATTRIBUTES, "source": torch.tensor([0, 1, -1])},
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_wrong_attributes_are_refused_before_anything_runs(sentence, make):
    model, batch = make("t5"), make_pairs("t5")
    ran = []
    model.base_model.get_encoder().register_forward_pre_hook(lambda *_: ran.append(1))
    with pytest.raises(ValueError, match=sentence) as raised:
        model(**batch, attributes=REFUSED[sentence])
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=sentence):
        model.generate(batch["input_ids"], attributes=REFUSED[sentence])
    assert not ran


def test_a_method_without_attributes_refuses_them(make):
    model = make("gpt2", ControlPrefixesConfig(prefix_length=2, mid=4))
    with pytest.raises(ValueError, match="no attributes, as the method has none, got cat, source"):
        model(**make_pairs("gpt2"), attributes=dict(reversed(ATTRIBUTES.items())))
    model(**make_pairs("gpt2"), attributes={})
    base = make("gpt2").base_model
    with pytest.raises(ValueError, match="call the PeltModel, not its base_model"):
        base(**make_pairs("gpt2"))


def test_layers_that_are_not_there_are_refused():
    for kind in ("encoder", "decoder", "cross"):
        config = dataclasses.replace(CONTROL, **{f"skip_{kind}": (2,)})
        with pytest.raises(ValueError, match=rf"skip_{kind} .*got \[2\]"):
            get_pelt_model(make_language_model("t5"), config)
    with pytest.raises(ValueError, match=r"skip_cross .* has no such attention, got \[0\]"):
        get_pelt_model(make_language_model("gpt2"), dataclasses.replace(CONTROL, skip_cross=(0,)))
