"""Every head of transformers in a plain transformers.Trainer: columns, labels, loss, evaluation."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings

import pytest
import torch
import transformers as hf
from every_method import METHODS
from transformers import Trainer, TrainingArguments
from transformers.utils.generic import find_labels

from pelt_kernels.methods import AdaMixConfig, PSTConfig, parts_of, with_part_changes
from pelt_kernels.models import PeltModel, get_pelt_model
from pelt_kernels.nn import Bank

SIZES = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 16, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
ROWS, WIDTH = 4, 6
REGRESSION = {"problem_type": "regression"}

# class, config, what a row has beside input_ids: the labels' names with shape and kind.
HEADS = {
    "classes": (hf.BertForSequenceClassification, {"num_labels": 3}, {"labels": ((), 3)}),
    "score": (hf.BertForSequenceClassification, {"num_labels": 1}, {"labels": ((), 0)}),
    "scores": (
        hf.BertForSequenceClassification,
        {"num_labels": 3, **REGRESSION},
        {"labels": ((3,), 0)},
    ),
    "several": (hf.BertForSequenceClassification, {"num_labels": 3}, {"labels": ((3,), 0)}),
    "tokens": (hf.BertForTokenClassification, {"num_labels": 3}, {"labels": ((WIDTH,), 3)}),
    "answers": (
        hf.BertForQuestionAnswering,
        {},
        {"start_positions": ((), WIDTH), "end_positions": ((), WIDTH)},
    ),
    "choices": (hf.BertForMultipleChoice, {}, {"labels": ((), 2)}),
    "words": (hf.BertForMaskedLM, {}, {"labels": ((WIDTH,), 50)}),
    "next": (hf.BertForNextSentencePrediction, {}, {"labels": ((), 2)}),
}
EVERY_HEAD = pytest.mark.parametrize("head", HEADS)


def base_of(head):
    torch.manual_seed(0)
    model_class, changes, _ = HEADS[head]
    return model_class(hf.BertConfig(**SIZES, initializer_range=0.2, **changes))


class Rows(torch.utils.data.Dataset):
    """A data set with the columns that Trainer's choice of columns reads (`datasets` has them)."""

    def __init__(self, head):
        generator = torch.Generator().manual_seed(1)
        shape = (ROWS, 2, WIDTH) if head == "choices" else (ROWS, WIDTH)
        self.columns = {"input_ids": torch.randint(5, 50, shape, generator=generator)}
        for name, (of_row, classes) in HEADS[head][2].items():
            shape = (ROWS, *of_row)
            self.columns[name] = (
                torch.randint(classes, shape, generator=generator)
                if classes
                else torch.rand(shape, generator=generator)
            )

    def __len__(self):
        return ROWS

    def __getitem__(self, at):
        return {name: value[at] for name, value in self.columns.items()}


def trainer_of(model, folder, head, **options):
    arguments = TrainingArguments(
        str(folder), max_steps=1, per_device_train_batch_size=ROWS, use_cpu=True, report_to=[],
        disable_tqdm=True, logging_strategy="no", save_strategy="no", learning_rate=1e-2,
        **options,
    )  # fmt: skip
    callbacks = getattr(model, "callbacks", list)()
    rows = Rows(head)
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=callbacks)


@EVERY_HEAD
@pytest.mark.parametrize("method", ["lora", "unipelt", "adamix", "adamix-lora", "pst"])
def test_a_step_and_an_evaluation(head, method, tmp_path, recwarn):
    base = base_of(head)
    expected = trainer_of(base, tmp_path, head)
    expected._set_signature_columns_if_needed()
    wanted = expected.evaluate()
    model = get_pelt_model(base, METHODS[method])
    model.set_progress(0.0)
    trainer = trainer_of(model, tmp_path, head)
    trainer._set_signature_columns_if_needed()
    assert trainer.label_names == expected.label_names
    assert set(trainer._signature_columns) == set(expected._signature_columns)
    assert not set(HEADS[head][2]) - set(trainer._signature_columns)
    if method in ("lora", "pst", "adamix-lora"):  # the base model itself at the start
        found = trainer.evaluate()
        assert found["eval_loss"] == pytest.approx(wanted["eval_loss"], rel=1e-5)
        assert found.keys() == wanted.keys()
    before = {name: value.clone() for name, value in model.trained_parameters().items()}
    assert trainer.train().training_loss > 0
    moved = [n for n, v in model.trained_parameters().items() if not torch.equal(v, before[n])]
    assert any(n.startswith(("base_model.bert", "prefix")) for n in moved)
    assert trainer.evaluate()["eval_loss"] > 0
    predicted, labels, _ = trainer.predict(trainer.eval_dataset)
    assert labels is not None
    assert (len(predicted) == 2) if head == "answers" else predicted.shape[0] == ROWS
    about = [str(warning.message) for warning in recwarn if "AdaMix" in str(warning.message)]
    assert bool(about) == (method.startswith("adamix") and head in ("score", "scores"))


@EVERY_HEAD
@pytest.mark.parametrize("return_dict", [True, False])
def test_adamixs_outputs_in_training_are_the_base_models(head, return_dict):
    """Loss of the base model, batch of B, a tuple where one is asked for, plus the consistency."""
    batch = Rows(head).columns | {"output_hidden_states": True, "return_dict": return_dict}
    base = base_of(head)
    with torch.no_grad():
        plain = copy.deepcopy(base)(**batch)
    model = get_pelt_model(base, AdaMixConfig(kind="lora", experts=3, r=2)).train()
    found = model(**batch)  # B = 0 at the start: all experts are the base model
    assert type(found) is type(plain) and len(found) == len(plain)
    assert model.base_model.config.num_labels == base.config.num_labels
    for one, other in zip(
        found if isinstance(found, tuple) else found.values(),
        plain if isinstance(plain, tuple) else plain.values(),
        strict=True,
    ):
        for a, b in zip(one, other) if isinstance(one, tuple) else [(one, other)]:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@EVERY_HEAD
def test_the_consistency_of_each_head_is_its_formula(head):
    """The distributions that a head's loss reads, compared between the two passes."""
    batch = Rows(head).columns
    if head in ("tokens", "words"):
        batch["labels"][0, 1:] = -100
    config = AdaMixConfig(experts=16, bottleneck=4, share_up=False)
    model = get_pelt_model(base_of(head), config).train()
    made = []  # before anything is added to the loss
    model.base_model.register_forward_hook(lambda _, args, output: made.append(dict(output)))
    with torch.no_grad():
        for parameter in model.trained_parameters().values():
            parameter.add_(0.3 * torch.randn(parameter.shape))
        found = model(**batch).loss
    if head in ("score", "scores"):
        assert len(made) == 1 and torch.equal(found, made[0]["loss"])
        return

    def divergence(z1, z2):
        p1, p2 = z1.double().softmax(-1), z2.double().softmax(-1)
        return 0.5 * ((p1 - p2) * (p1.log() - p2.log())).sum(-1)

    def between(name):
        return divergence(*(out[name] for out in made))

    if head == "answers":
        expected = (between("start_logits").mean() + between("end_logits").mean()) / 2
    elif head == "several":
        zeros = torch.zeros_like(made[0]["logits"])
        yes_or_no = [torch.stack([zeros, out["logits"]], -1) for out in made]
        expected = divergence(*yes_or_no).mean()
    else:
        expected = between("logits")[batch["labels"] != -100].mean()
    assert len(made) == 2 and expected > 1e-5
    torch.testing.assert_close(found.double(), made[0]["loss"] + expected, rtol=1e-5, atol=1e-6)


def test_labels_of_a_shape_that_only_the_base_model_flattens():
    batch = Rows("classes").columns
    model = get_pelt_model(base_of("classes"), METHODS["adamix"]).train()
    torch.manual_seed(0)
    expected = model(**batch).loss
    torch.manual_seed(0)
    assert torch.equal(model(**batch | {"labels": batch["labels"][:, None]}).loss, expected)


def test_a_decoders_consistency_counts_the_tokens_that_are_predicted():
    torch.manual_seed(0)
    base = hf.BertLMHeadModel(hf.BertConfig(**SIZES, is_decoder=True, initializer_range=0.2))
    model = get_pelt_model(base, AdaMixConfig(kind="lora", experts=3, r=2)).train()
    ids = torch.randint(5, 50, (2, WIDTH))
    labels = ids.clone()
    labels[:, 2:] = -100  # the logits of the first token alone have a label
    made = []
    base.register_forward_hook(lambda _, args, output: made.append(dict(output)))
    with torch.no_grad():
        for parameter in model.trained_parameters().values():
            parameter.add_(0.3 * torch.randn(parameter.shape))
        found = model(input_ids=ids, labels=labels).loss
    p1, p2 = (out["logits"][:, 0].double().softmax(-1) for out in made)
    kl = 0.5 * ((p1 - p2) * (p1.log() - p2.log())).sum(-1).mean()
    torch.testing.assert_close(found.double(), made[0]["loss"] + kl, rtol=1e-5, atol=1e-6)


def test_adamix_says_which_head_has_no_consistency():
    base = hf.BertForPreTraining(hf.BertConfig(**SIZES))
    model = get_pelt_model(base, METHODS["adamix"]).train()
    ids = torch.randint(5, 50, (2, WIDTH))
    batch = {"input_ids": ids, "labels": ids, "next_sentence_label": torch.tensor([0, 1])}
    with pytest.raises(ValueError, match="got BertForPreTraining, whose outputs are loss, predict"):
        model(**batch)
    assert find_labels(type(model)) == ["labels", "next_sentence_label"]


@pytest.mark.parametrize("option", ["label_smoothing_factor", "compute_loss_func"])
def test_a_trainer_that_takes_the_labels_away_is_told_of_the_consistency(option, tmp_path):
    model = get_pelt_model(base_of("classes"), METHODS["adamix"])
    options = {option: 0.1} if option == "label_smoothing_factor" else {}
    trainer = trainer_of(model, tmp_path, "classes", **options)
    if not options:
        trainer.compute_loss_func = lambda outputs, labels, **_: outputs.logits.square().mean()
    with pytest.warns(UserWarning, match="without labels leaves the consistency loss out"):
        trainer.train()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        model(input_ids=torch.tensor([[5, 6]]))


def test_pst_without_its_callback_is_refused_before_a_step(tmp_path):
    config = PSTConfig(sparsity=0.5, r1=2, r2=2)
    model = get_pelt_model(base_of("classes"), config)
    bare = trainer_of(model, tmp_path, "classes")
    bare.remove_callback(type(model.callbacks()[0]))
    with pytest.raises(ValueError, match=r"give transformers.Trainer callbacks=model.callbacks()"):
        bare.train()
    trainer_of(model, tmp_path, "classes").train()
    assert set(model.density().values()) == {0.5}
    unpruned = get_pelt_model(base_of("classes"), with_part_changes(config, PSTConfig, sparsity=0))
    assert unpruned.train()(**Rows("classes").columns).loss.isfinite()
    untold = get_pelt_model(base_of("classes"), config).train()
    with torch.no_grad():
        untold(**Rows("classes").columns)


def test_adamixs_callback_spares_the_experts_that_were_not_drawn(tmp_path, monkeypatch):
    drawn = {}
    draw = Bank.draw

    def watched(bank):
        made = draw(bank)
        drawn.setdefault(bank, set()).add(int(made[0]))
        return made

    monkeypatch.setattr(Bank, "draw", watched)
    config = AdaMixConfig(experts=6, bottleneck=4)
    for is_spared in (True, False):
        drawn.clear()
        model = get_pelt_model(base_of("classes"), config)
        trainer = trainer_of(model, tmp_path, "classes", weight_decay=0.5)
        if not is_spared:
            trainer.remove_callback(type(model.callbacks()[0]))
        (bank,) = (module for module in model.modules() if isinstance(module, Bank))
        before = bank.w_down.detach().clone()
        trainer.train()
        stayed = {k for k in range(6) if torch.equal(bank.w_down[k], before[k])}
        assert stayed == (set(range(6)) - drawn[bank] if is_spared else set())
        # An optimizer that is stepped after the training changes nothing any more.
        optimizer = trainer.optimizer.optimizer
        assert not optimizer._optimizer_step_pre_hooks


def test_other_methods_need_no_callback():
    for method, config in METHODS.items():
        needed = get_pelt_model(base_of("classes"), config).callbacks()
        assert bool(needed) == bool(parts_of(config).pruning or parts_of(config).mixture), method


def test_the_class_that_shows_the_heads_signature_is_a_pelt_model_like_any():
    base = base_of("answers")
    model = get_pelt_model(base, METHODS["lora"])
    assert isinstance(model, PeltModel) and type(model).__name__ == "PeltBertForQuestionAnswering"
    assert inspect.signature(model.forward) == inspect.signature(base.forward)
    batch = Rows("answers").columns
    expected = model.eval()(**batch).loss
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again) is type(model) and again.base_model is not model.base_model
        assert torch.equal(again(**batch).loss, expected)
    assert torch.equal(model(batch["input_ids"]).start_logits, model(**batch).start_logits)

    class Own(PeltModel):
        def extra(self):
            return 1

    own = Own(base_of("tokens"), METHODS["lora"])
    assert own.extra() == 1 and isinstance(own, Own) and find_labels(type(own)) == ["labels"]


def test_label_smoothing_of_a_decoder_shifts_the_labels(tmp_path):
    config = hf.BertConfig(**SIZES, is_decoder=True, initializer_range=0.2)
    found = []
    for wraps in (lambda base: base, lambda base: get_pelt_model(base, METHODS["lora"])):
        torch.manual_seed(0)
        model = wraps(hf.BertLMHeadModel(config))
        trainer = trainer_of(model, tmp_path, "words", label_smoothing_factor=0.1)
        found.append(trainer.evaluate()["eval_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)
