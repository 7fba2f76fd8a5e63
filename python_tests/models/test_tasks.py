"""VLM and HyperPELT in models that write: tasks mixed in a batch, in beams, materialised, saved."""

from __future__ import annotations

import copy
import inspect
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from families import PAD, WORDS, make_writer
from test_writers import batch, prompts, randomised, write
from torch import nn

from pelt_kernels import PrefixTuningConfig, get_pelt_model
from pelt_kernels.methods import HyperPELTConfig, VLMConfig
from pelt_kernels.models import PeltModel
from pelt_kernels.models.slots import layers_of, stacks_of

VLM = VLMConfig(tasks=("mt", "qa", "sum"), bottlenecks=(4, 6, 2))
HYPER = HyperPELTConfig(tasks=("mt", "qa", "sum"), bottleneck=4, prefix_length=3)
SEEING = HyperPELTConfig(tasks=("colour", "shape"), bottleneck=4, prefix_length=3, features=5)
METHODS = {"vlm": VLM, "hyper": HYPER}
FAMILIES = ("gpt2", "t5", "bart")


def make(
    family: str, method: str | VLMConfig | HyperPELTConfig, std: float = 0.2, **changes
) -> PeltModel:
    config = METHODS[method] if isinstance(method, str) else method
    return randomised(get_pelt_model(make_writer(family, **changes), config), std).eval()


def one_by_one(model, inputs, tasks):
    """The logits of each sample alone, with its task as a number for the whole batch."""
    rows = []
    for row, task in enumerate(tasks):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        rows.append(model(**alone, tasks=task).logits)
    return torch.cat(rows)


def read_rows(inputs, logits):
    """The logits of real tokens; a decoder's padding rows differ with what surrounds them."""
    return logits[inputs["attention_mask"].bool()] if logits.shape[1] == 9 else logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_tasks_is_its_samples_one_by_one(method, family):
    model, inputs = make(family, method), batch(family)
    with torch.no_grad():
        for tasks in ([1, 0, 2], [1, 1, 0]):
            given = model(**inputs, tasks=torch.tensor(tasks)).logits
            alone = one_by_one(model, inputs, tasks)
            found, expected = read_rows(inputs, given), read_rows(inputs, alone)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            by_name = model(**inputs, tasks=[model.method_config.tasks[t] for t in tasks]).logits
            assert torch.equal(by_name, given)
        assert not torch.allclose(given, model(**inputs, tasks="sum").logits, atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("search", ["greedy", "beam"])
def test_words_with_a_cache_without_in_beams_and_alone(search, method, family):
    config = replace(HYPER, train_norms=False) if method == "hyper" else VLM
    model = make(family, config, std=1.0)  # so that the task decides what is written
    ids, mask = prompts(family)
    tasks = torch.tensor([2, 0])
    written = write(model, ids, mask, search, tasks=tasks)
    assert torch.equal(write(model, ids, mask, search, tasks=tasks, use_cache=False), written)
    start = 0 if family != "gpt2" else ids.shape[1]
    for row, task in enumerate(model.method_config.tasks[t] for t in tasks):
        seen = mask[row].bool()
        alone = write(
            model, ids[row : row + 1, seen], mask[row : row + 1, seen], search, tasks=task
        )
        begin = 0 if start == 0 else int(seen.sum())
        assert torch.equal(alone[0, begin:], written[row, start:]), row
    assert not torch.equal(write(model, ids, mask, search, tasks="qa"), written)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_have_the_tasks_of_their_forward(reentrant, method, family):
    """Also where another call comes between a forward and its backward."""
    inputs, tasks = batch(family), torch.tensor([1, 0, 2])
    grads = []
    for is_checkpointed in (False, True):
        model = make(family, method).train()
        if is_checkpointed:
            options = {"use_reentrant": reentrant}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        loss = model(**inputs, tasks=tasks, use_cache=False).loss
        with torch.no_grad():
            model(**inputs, tasks=0, use_cache=False)
        loss.backward()
        grads.append({n: p.grad for n, p in model.trained_parameters().items()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-6, msg=name)
        assert grad.any(), name


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize("method", METHODS)
def test_saving_loading_copies_and_going_back(method, family, tmp_path):
    base = make_writer(family)
    first = {name: value.clone() for name, value in base.state_dict().items()}
    inputs, tasks = batch(family), torch.tensor([1, 0, 2])
    model = randomised(get_pelt_model(base, METHODS[method])).eval()
    model.set_task("qa")
    with torch.no_grad():
        logits, default = model(**inputs, tasks=tasks).logits, model(**inputs).logits
        assert torch.equal(default, model(**inputs, tasks=1).logits)
        model.save_pretrained(tmp_path)
        again = PeltModel.from_pretrained(make_writer(family), tmp_path)
        copies = [again, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for other in copies:
            assert torch.equal(other(**inputs, tasks=tasks).logits, logits)
        with pytest.raises(ValueError, match="expected tasks out of mt, qa, sum"):
            again(**inputs)
        with model.disable_adapter():
            plain = model(**inputs, tasks=tasks).logits
        back = model.remove()
        assert torch.equal(back(**inputs).logits, plain) and not torch.equal(plain, logits)
    for name, value in back.state_dict().items():
        assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_materialised_task_has_the_same_outputs(family, tmp_path):
    model, inputs = make(family, "hyper"), batch(family)
    ids, mask = prompts(family)
    with torch.no_grad():
        expected = model(**inputs, tasks="qa").logits
        written = write(model, ids, mask, tasks="qa")
        held = sum(p.numel() for p in model.trained_parameters().values())
        model.materialize("qa")
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-6)
        assert torch.equal(write(model, ids, mask), written)
        model.save_pretrained(tmp_path)
        again = PeltModel.from_pretrained(make_writer(family), tmp_path)
        assert again.method_config.materialized and again.method_config.tasks == ("qa",)
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert sum(p.numel() for p in again.trained_parameters().values()) < held
    with pytest.raises(ValueError, match="materialize: expected .*'hyperpelt' without"):
        model.materialize("qa")
    with pytest.raises(ValueError, match="expected no tasks"):
        model(**inputs, tasks=0)


def test_written_prefixes_and_adapters_stand_where_the_paper_has_them():
    """A T5 with the same prefixes as plain tables, and hooks that add λ LN(...) to each FFN."""
    model, inputs = make("t5", "hyper"), batch("t5")
    model.materialize("sum")
    with torch.no_grad():
        expected = model(**inputs).logits
        plain = get_pelt_model(make_writer("t5"), PrefixTuningConfig(prefix_length=3, mid=None))
        for name, value in model.base_model.state_dict().items():
            plain.base_model.state_dict()[name].copy_(value)  # the norms are trained, too
        stacks = model.written.stacks
        for site, stack, block in (("encoder", "encoder", 0), ("decoder", "decoder", 0),
                                   ("cross", "decoder", 1)):  # fmt: skip
            table = torch.stack([stacks[stack].keys[:, block], stacks[stack].values[:, block]], 1)
            plain.prefix[site].table.copy_(table)
        assert (plain(**inputs).logits - expected).abs().max() > 1e-2
        for slots in stacks_of(plain.base_model):
            for number, layer in enumerate(layers_of(plain.base_model, slots)):
                a = {n: p[number] for n, p in stacks[slots.name].named_parameters()}

                def add(ffn, args, output, a=a):
                    hidden = args[0] @ a["w_down"].T + a["b_down"]
                    u = F.gelu(hidden, approximate="tanh") @ a["w_up"].T + a["b_up"]
                    weights = (a["norm_weight"], a["norm_bias"])
                    return output + a["scale"] * F.layer_norm(u, u.shape[-1:], *weights, 1e-6)

                layer.layer[-1].DenseReluDense.register_forward_hook(add)
        found = plain(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_vlm_adapters_come_after_the_residual_of_the_ffn():
    """GPT-2's blocks one after the other, with segments, in float64."""
    model = randomised(get_pelt_model(make_writer("gpt2").double(), VLM)).eval()
    ids, segments = torch.randint(5, WORDS, (2, 3, 7)).unbind()
    tasks = torch.tensor([2, 0, 1])
    gpt = model.base_model.transformer
    with torch.no_grad():
        found = model(ids, token_type_ids=segments, tasks=tasks).logits
        with model.disable_adapter():
            h = gpt.wte(ids) + gpt.wpe(torch.arange(7)) + gpt.wte(segments)
            for block, bank in zip(gpt.h, model.task_adapters, strict=True):
                h = block(h)
                h = h[0] if isinstance(h, tuple) else h
                rows = []
                for sample, task in zip(h, tasks):
                    p = {name: value[task] for name, value in bank.named_parameters()}
                    normed = F.layer_norm(sample, (32,), p["norm_weight"], p["norm_bias"], 1e-5)
                    hidden = torch.relu(normed @ p["w_down"].T + p["b_down"])
                    rows.append(sample + hidden @ p["w_up"].T + p["b_up"])
                h = torch.stack(rows)
            expected = model.base_model.lm_head(gpt.ln_f(h))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_the_task_of_no_adapter_is_the_base_model():
    model, inputs = make("gpt2", "vlm"), batch("gpt2")
    with torch.no_grad():
        with model.disable_adapter():
            plain = model(**inputs).logits
        assert torch.equal(model(**inputs, tasks=-1).logits, plain)
        mixed = model(**inputs, tasks=torch.tensor([-1, 2, -1])).logits
    torch.testing.assert_close(mixed[::2], plain[::2], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mixed[1], plain[1], atol=1e-2)


@pytest.mark.parametrize("method", METHODS)
def test_ten_steps_train_the_method_and_nothing_else(method):
    """The base has no gradients at all, so nothing stale can be clipped with."""
    base = make_writer("gpt2")
    base.resize_token_embeddings(WORDS + 2, mean_resizing=False)
    config = METHODS[method]
    if method == "vlm":
        config = VLMConfig(tasks=VLM.tasks, bottlenecks=(4,), trainable_tokens=(WORDS, WORDS + 1))
    first = {name: value.detach().clone() for name, value in base.named_parameters()}
    model = get_pelt_model(base, config).train()
    inputs, tasks = batch("gpt2"), torch.tensor([1, 0, 1])
    inputs["input_ids"][:, 0] = WORDS + tasks
    trained = list(model.trained_parameters().values())
    optimizer = torch.optim.AdamW(trained, lr=5e-3)
    losses = []
    for _ in range(10):
        loss = model(**inputs, token_type_ids=inputs["input_ids"], tasks=tasks).loss
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        own = torch.stack([p.grad.norm() for p in trained if p.grad is not None]).norm()
        torch.testing.assert_close(own, norm.clamp(max=1.0), rtol=1e-4, atol=1e-6)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    in_place = {name for name in first if f"base_model.{name}" in model.trained_parameters()}
    assert all(".ln_" in name for name in in_place) and bool(in_place) == (method == "hyper")
    for name, value in base.named_parameters():
        if name in first and name not in in_place:
            assert value.grad is None and torch.equal(value, first[name]), name
    if method == "vlm":
        assert not torch.equal(model.tokens.weight, first["transformer.wte.weight"][-2:])


def test_features_of_images_give_each_sample_weights_of_its_own():
    model, inputs = make("t5", SEEING), batch("t5")
    ids, mask = prompts("t5")
    features = torch.randn(3, 4, 5)
    tasks = torch.tensor([0, 1, 0])
    with torch.no_grad():
        given = model(**inputs, tasks=tasks, image_features=features).logits
        for row in range(3):
            alone = {name: value[row : row + 1] for name, value in inputs.items()}
            one = {"tasks": int(tasks[row]), "image_features": features[row : row + 1]}
            torch.testing.assert_close(
                model(**alone, **one).logits[0], given[row], rtol=1e-4, atol=1e-4
            )
        other = model(**inputs, tasks=tasks, image_features=features.flip(0)).logits
        assert not torch.allclose(other[0], given[0], atol=1e-2)
        assert torch.equal(other[1], given[1])
    for search in ("greedy", "beam"):
        seen = {"tasks": tasks[:2], "image_features": features[:2]}
        written = write(model, ids, mask, search, **seen)
        assert torch.equal(write(model, ids, mask, search, use_cache=False, **seen), written)
        for row in range(2):
            own = mask[row].bool()
            one = {name: value[row : row + 1] for name, value in seen.items()}
            alone = write(model, ids[row : row + 1, own], mask[row : row + 1, own], search, **one)
            assert torch.equal(alone[0], written[row])
    model.train()
    model(**inputs, tasks=tasks, image_features=features).loss.backward()
    for name, parameter in model.written.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    with pytest.raises(ValueError, match="depend on each sample's image_features"):
        model.materialize("shape")


MISTAKES = {
    "expected tasks out of mt, qa, sum .*got none; set_task": {},
    "expected tasks out of mt, qa, sum .*got 'xx'": {"tasks": "xx"},
    "expected tasks .*got 3": {"tasks": torch.tensor([0, 3, 1])},
    "expected tasks .*got -2": {"tasks": torch.tensor([0, -2, 1])},
    "expected tasks .*got True": {"tasks": True},
    r"expected tasks \[3\], one for each sentence, got 2": {"tasks": torch.tensor([0, 1])},
    r"int64 \[B\], got \[3\] float32": {"tasks": torch.zeros(3)},
    r"int64 \[B\], got \[3, 1\] int64": {"tasks": torch.zeros(3, 1, dtype=torch.int64)},
    "or a tensor int64 .*got dict": {"tasks": {"mt": 1}},
    "expected no image_features": {"tasks": 0, "image_features": torch.zeros(3, 4, 5)},
}


@pytest.mark.parametrize("words", MISTAKES)
@pytest.mark.parametrize("method", METHODS)
def test_mistakes_are_told_before_anything_runs(method, words):
    model, inputs = make("gpt2", method), batch("gpt2")
    model.base_model.transformer.wte.register_forward_hook(lambda *_: pytest.fail("it ran"))
    with pytest.raises(ValueError, match=words):
        model(**inputs, **MISTAKES[words])
    inputs.pop("labels")
    with pytest.raises(ValueError, match=words):
        model.generate(**inputs, **MISTAKES[words])


FEATURE_MISTAKES = {
    "expected image_features .*got none": None,
    r"image_features \[3, cells, 5\] .*got \[3, 4, 6\] float32": torch.zeros(3, 4, 6),
    r"image_features \[3, cells, 5\] .*got \[2, 4, 5\] float32": torch.zeros(2, 4, 5),
    r"got \[3, 5\] float32": torch.zeros(3, 5),
    r"got \[3, 4, 5\] int64": torch.zeros(3, 4, 5, dtype=torch.int64),
    r"got \[3, 0, 5\] float32": torch.zeros(3, 0, 5),
    "got list": [0.0],
}


@pytest.mark.parametrize("words", FEATURE_MISTAKES)
def test_features_have_to_fit(words):
    model, inputs = make("t5", SEEING), batch("t5")
    with pytest.raises(ValueError, match=words):
        model(**inputs, tasks=0, image_features=FEATURE_MISTAKES[words])


def test_more_mistakes_get_a_sentence():
    with pytest.raises(ValueError, match="expected tasks .*got -1"):
        make("gpt2", "hyper")(**batch("gpt2"), tasks=-1)
    model = make("gpt2", "vlm")
    with pytest.raises(ValueError, match="materialize: expected the method 'hyperpelt'.*got 'vlm'"):
        model.materialize("mt")
    with pytest.raises(ValueError, match="got 'de'"):
        model.set_task("de")
    with pytest.raises(ValueError, match="among the inputs of this call, got none"):
        model.base_model(**batch("gpt2"))
    plain = get_pelt_model(make_writer("gpt2"), PrefixTuningConfig(prefix_length=2, mid=None))
    with pytest.raises(ValueError, match="set_task: expected a method for several tasks"):
        plain.set_task("mt")
    with pytest.raises(ValueError, match="expected no tasks, as the method has no tasks"):
        plain(**batch("gpt2"), tasks=0)


@pytest.mark.parametrize("method", [*METHODS, SEEING], ids=str)
def test_inputs_are_shown_to_a_trainer(method):
    names = inspect.signature(make("t5", method).forward).parameters
    assert "tasks" in names and "input_ids" in names
    assert ("image_features" in names) == (method is SEEING)


def test_a_padded_task_stays_padded():
    """Of VLM's bottlenecks 4, 6 and 2 the banks are 6 high; the rest stays at zero in training."""
    model = get_pelt_model(make_writer("gpt2"), VLM).train()
    optimizer = torch.optim.AdamW(model.trained_parameters().values(), lr=0.01)
    inputs = batch("gpt2")
    assert (inputs["input_ids"] == PAD).any()
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs, tasks=torch.tensor([0, 1, 2])).loss.backward()
        optimizer.step()
    for bank in model.task_adapters:
        for task, m in enumerate(VLM.bottlenecks):
            assert bank.w_down[task, :m].any() and not bank.w_down[task, m:].any()
