"""What belongs to one forward, AdaMix's drawn experts, stays with it: in the recomputation of its
layers, in forwards that come between or inside, in calls past the PeltModel, in other threads.
"""

from __future__ import annotations

import threading

import pytest
import torch
import transformers as hf
from every_method import METHODS
from test_adamix import KINDS
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments

from pelt_kernels.methods import AdaMixConfig, with_part_changes
from pelt_kernels.models import get_pelt_model

REENTRANT = pytest.mark.parametrize("use_reentrant", [False, True])
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def without_consistency(kind):
    return with_part_changes(KINDS[kind], AdaMixConfig, consistency=0.0)


def enable(model, use_reentrant):
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})


def assert_same_gradients(make_model, loss_of, change):
    """`loss_of` a model gives the same value and gradients after `change`."""
    found = []
    for is_changed in (False, True):
        model = make_model().train()
        model.is_wrapped = False
        if is_changed:
            change(model)
        torch.manual_seed(7)
        loss = loss_of(model)
        loss.backward()
        found.append((loss, {n: p.grad for n, p in model.trained_parameters().items()}))
    (loss, grads), (other_loss, others) = found
    assert torch.equal(loss, other_loss)
    assert sum(g is not None and bool(g.abs().max() > 0) for g in grads.values()) > 2
    for name, grad in grads.items():
        torch.testing.assert_close(others[name], grad, rtol=1e-5, atol=1e-7, msg=name)


@REENTRANT
@EVERY_KIND
@pytest.mark.parametrize("consistency", [0.0, 1.0])
def test_checkpointed_layers_meet_the_experts_of_their_own_forward(
    kind, use_reentrant, consistency, make_base, make_batch, randomise
):
    """Three forwards of different sizes, then one backward."""
    config = with_part_changes(KINDS[kind], AdaMixConfig, consistency=consistency)
    batches = make_batch(), make_batch((3, 8), width=12), make_batch((5,) * 6)

    def loss_of(model):
        outputs = [model(**batch) for batch in batches]
        return outputs[0].loss - outputs[1].loss * 3 + outputs[2].logits.square().sum()

    assert_same_gradients(
        lambda: randomise(get_pelt_model(make_base(dropout=0.1), config)),
        loss_of,
        lambda model: enable(model, use_reentrant),
    )


@REENTRANT
def test_a_checkpoint_of_ones_own_around_the_model(use_reentrant, make_base, make_batch, randomise):
    batch = make_batch(with_labels=False)
    embedded = torch.randn(*batch["input_ids"].shape, 32, requires_grad=True)

    def loss_of(model):
        def logits(x):
            return model(inputs_embeds=x).logits

        def call(x):
            return checkpoint(logits, x, use_reentrant=use_reentrant)

        answer = call if model.is_wrapped else logits
        return (answer(embedded) - 2 * answer(embedded)).square().sum()

    assert_same_gradients(
        lambda: randomise(get_pelt_model(make_base(), without_consistency("lora"))),
        loss_of,
        lambda model: setattr(model, "is_wrapped", True),
    )


def test_checkpointing_without_the_random_state_is_refused(make_base, make_batch):
    model = get_pelt_model(make_base(), KINDS["lora"]).train()
    options = {"use_reentrant": False, "preserve_rng_state": False}
    model.base_model.activation_checkpointing_enable(options)
    with pytest.raises(ValueError, match="preserve_rng_state=True .a layer that is computed again"):
        model(**make_batch())
    model.eval()(**make_batch())


def test_a_call_of_the_base_model_draws_for_itself(make_base, make_batch, draws):
    model, batch = get_pelt_model(make_base(), KINDS["both_banks"]).train(), make_batch()
    losses = {model.base_model(**batch).loss.item() for _ in range(6)}
    first = next(iter(draws.values()))
    assert len(first) == 6 and len({tuple(drawn) for drawn in first}) > 1 and len(losses) > 1
    # An encoder inside the head's model, too.
    model.base_model.bert(batch["input_ids"])
    assert len(first) == 7


def test_a_forward_inside_a_forward_leaves_it_its_experts(make_base, make_batch, randomise):
    """A hook that asks the model something else between two layers of a training forward."""
    other = make_batch((4,), with_labels=False)

    def ask_in_between(model):
        is_inside = []

        def ask(*_):
            if not is_inside:
                is_inside.append(True)
                with torch.no_grad(), torch.random.fork_rng():
                    model.base_model(**other)
                is_inside.clear()

        model.base_model.bert.encoder.layer[1].register_forward_pre_hook(ask)

    for use_reentrant in (False, True):

        def change(model, use_reentrant=use_reentrant):
            enable(model, use_reentrant)
            ask_in_between(model)

        assert_same_gradients(
            lambda: randomise(get_pelt_model(make_base(), KINDS["adapter"])),
            lambda model: model(**make_batch()).loss,
            change,
        )


INSIDE = ["attention.self.query", "attention.self.key", "intermediate.dense", "output.LayerNorm"]


@pytest.mark.parametrize("place", INSIDE)
@pytest.mark.parametrize("method", ["unipelt", "mam", "composite"])
def test_a_forward_inside_a_layer_leaves_it_its_mask_and_gates(
    method, place, make_base, make_batch, randomise
):
    """A hook within a layer asks the model something else, which may even fail."""
    batch, other = make_batch(with_labels=False), make_batch((4, 2), with_labels=False)
    model = randomise(get_pelt_model(make_base(), METHODS[method])).eval()
    expected, answer = model(**batch).logits, model(**other).logits
    inside = []

    def ask(*_):
        if inside:
            inside.pop()()
            return
        inside.append(lambda: None)
        assert torch.equal(model.base_model(**other).logits, answer)
        inside.append(lambda: [][0])
        with pytest.raises(IndexError):
            model.base_model(**other)

    layer = model.base_model.bert.encoder.layer[1]
    layer.get_submodule(place).register_forward_pre_hook(ask)
    assert torch.equal(model(**batch).logits, expected)


def test_every_step_of_a_generation_draws(draws):
    config = hf.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, is_decoder=True,
    )  # fmt: skip
    model = get_pelt_model(hf.BertLMHeadModel(config), KINDS["lora"]).train()
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert [len(drawn) for drawn in draws.values()] == [4, 4]


def test_models_in_threads_draw_and_train_apart(make_base, make_batch, randomise):
    """Each forward's gradient belongs to one expert of each bank, whatever other threads do."""
    config = without_consistency("lora")
    models = [randomise(get_pelt_model(make_base(), config)).train() for _ in range(3)]
    models.append(models[0])  # and one model twice
    failed = []

    def train(model, size):
        for _ in range(5):
            out = model(**make_batch((5,) * size))
            names, parameters = zip(*model.trained_parameters().items(), strict=True)
            grads = torch.autograd.grad(out.loss, parameters)
            for name, grad in zip(names, grads, strict=True):
                if name.endswith("lora_a"):
                    drawn = grad.flatten(1).any(dim=1).sum()
                    if drawn != 1:
                        failed.append((name, int(drawn)))

    threads = [threading.Thread(target=train, args=(m, 2 + i)) for i, m in enumerate(models)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_a_plain_trainer_resumes_to_the_very_weights(make_base, make_batch, tmp_path):
    batch = make_batch((6,) * 12)
    rows = [{name: value[i] for name, value in batch.items()} for i in range(12)]

    def train(folder, **options):
        torch.manual_seed(0)
        model = get_pelt_model(make_base(dropout=0.1), AdaMixConfig(reduction_factor=8))
        arguments = TrainingArguments(
            str(tmp_path / folder), num_train_epochs=2, per_device_train_batch_size=4, seed=3,
            save_strategy="epoch", learning_rate=1e-2, use_cpu=True, report_to=[],
            disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows).train(**options)
        return model.state_dict()

    whole = train("whole")
    resumed = train("resumed", resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
