"""torch.compile of training steps with dropout in the model and in the method, and torch.export."""

from __future__ import annotations

import io

import pytest
import torch
from every_method import METHODS
from test_training import trainer

from pelt_kernels.methods import (
    AdaMixConfig,
    BottleneckAdapterConfig,
    ControlPrefixesConfig,
    HyperPELTConfig,
    LoraConfig,
    with_part_changes,
)
from pelt_kernels.models import get_pelt_model

# One of each method; AdaMix, and what others put together, is in `composite-adamix`.
STEPS = (
    "adapter", "lora", "prefix", "unipelt", "pst", "control-prefixes", "vlm", "hyperpelt", "bitfit",
    "composite-adamix", "full",
)  # fmt: skip
EXPORTED = {
    "unipelt": METHODS["unipelt"],
    "composite": METHODS["composite"],
    "attributes": ControlPrefixesConfig(prefix_length=3, mid=8, attributes={"domain": 4}),
    "tasks": HyperPELTConfig(tasks=("mt", "qa"), bottleneck=4, prefix_length=3),
}


def make_model(make_base, randomise, method):
    """A model in training with dropout wherever there can be any, PST half way."""
    config = METHODS[method]
    for kind in (LoraConfig, BottleneckAdapterConfig, AdaMixConfig):
        config = with_part_changes(config, kind, dropout=0.1)
    base = make_base(num_hidden_layers=1, dropout=0.1)
    # transformers notes it in the first forward, and all would be compiled again for it.
    base.config.problem_type = "single_label_classification"
    model = get_pelt_model(base, config)
    model.set_progress(0.5)
    return randomise(model, std=0.05).train()


def steps(model, function, batch):
    """The loss and the gradients of two steps without an optimizer, from one seed."""
    torch.manual_seed(3)
    found = []
    for _ in range(2):
        model.zero_grad()
        loss = function(**batch).loss
        loss.backward()
        trained = model.trained_parameters().items()
        found.append((loss.detach(), {n: p.grad.clone() for n, p in trained if p.grad is not None}))
    return found


def compare(found, expected, rtol, atol):
    assert found[0][0] != found[1][0]  # the second step has masks, and experts, of its own
    for (loss, grads), (true_loss, true_grads) in zip(found, expected, strict=True):
        torch.testing.assert_close(loss, true_loss, rtol=1e-6, atol=0)
        assert grads.keys() == true_grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, true_grads[name], rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("method", STEPS)
def test_a_training_step_with_dropout_is_one_graph(method, make_base, make_batch, randomise):
    """Counted, not asked for with fullgraph: where a break is allowed, a read of a drawn seed would
    split a layer between a gate and its use.
    """
    model, batch = make_model(make_base, randomise, method), make_batch()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="aot_eager")
    found = steps(model, compiled, batch)  # first, as the first forward of a new model
    compare(found, steps(model, model, batch), rtol=1e-5, atol=1e-7)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_inductor_takes_a_step(make_base, make_batch, randomise):
    model, batch = make_model(make_base, randomise, "prefix"), make_batch()
    torch._dynamo.reset()
    # PyTorch's own random numbers instead of inductor's, so that eager has the same masks.
    with torch._inductor.config.patch(fallback_random=True):
        found = steps(model, torch.compile(model, fullgraph=True), batch)
    compare(found, steps(model, model, batch), rtol=1e-4, atol=1e-6)


def test_a_trainer_compiles(make_base, make_batch, randomise, tmp_path):
    """Batches of several widths, which compile to a graph of any width."""
    losses = []
    for compiles in (False, True):
        torch._dynamo.reset()
        model = make_model(make_base, randomise, "unipelt")
        options = {"torch_compile": compiles, "torch_compile_backend": "aot_eager"}
        run = trainer(model, make_batch, tmp_path, max_steps=2, **options if compiles else {})
        losses.append(run.train().training_loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("method", EXPORTED)
def test_an_export_serves_any_batch_and_length(method, make_base, make_batch, randomise):
    def batch(lengths):
        made = make_batch(lengths, with_labels=False)
        labels = torch.arange(len(lengths)) % 2
        if method == "attributes":
            return made | {"attributes": {"domain": labels}}
        return made | ({"tasks": labels} if method == "tasks" else {})

    model = get_pelt_model(make_base(num_hidden_layers=1), EXPORTED[method])
    randomise(model, std=0.05).eval()
    given = batch((9, 4, 7))
    rows, width = torch.export.Dim("rows", max=64), torch.export.Dim("width", max=40)
    shapes = {"input_ids": {0: rows, 1: width}, "attention_mask": {0: rows, 1: width}}
    shapes |= {"attributes": {"domain": {0: rows}}, "tasks": {0: rows}}
    shapes = {name: shapes[name] for name in given}
    with torch.no_grad():
        program = torch.export.export(
            model, (), given, dynamic_shapes=shapes, strict=method == "unipelt"
        )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    other = batch((5, 3, 2, 11, 7))
    with torch.no_grad():
        assert torch.equal(again(**other).logits, model(**other).logits)
