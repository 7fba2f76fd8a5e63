"""Every encoder family with every method: ten steps, and the ways a tuned model is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from every_method import METHODS
from families import ENCODERS

from pelt_kernels.methods import PSTConfig, parts_of, with_part_changes
from pelt_kernels.models import PeltModel, get_pelt_model

EVERY = pytest.mark.parametrize("method", METHODS)


def optimizer_of(model):
    return torch.optim.AdamW(model.trained_parameters().values(), lr=5e-3)


def train(model, batch, optimizer, steps, of):
    """The losses of some steps of a training of `of` steps."""
    losses = []
    for step in steps:
        torch.manual_seed(step)
        model.set_progress(step / of)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("family", ENCODERS)
@EVERY
def test_ten_steps_reduce_the_loss_and_move_nothing_else(method, family, make_base, make_batch):
    model = get_pelt_model(make_base(family), METHODS[method]).train()
    trained = set(model.trained_parameters())
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    losses = train(model, make_batch(), optimizer_of(model), range(10), of=40)
    assert losses[-1] < losses[0] - 0.01
    now = dict(model.named_parameters())
    for name, value in before.items():
        assert name in trained or torch.equal(now[name], value), name
    moved = {name for name in trained if not torch.equal(now[name], before[name])}
    # What the classification head reads moves; a pooler, positions and types beyond it do not.
    still = [n for n in trained - moved if not any(w in n for w in ("pooler", "embeddings"))]
    assert not still, still


@pytest.mark.parametrize("family", ["bert", "distilbert"])
@EVERY
def test_training_resumes_from_its_files_bit_for_bit(
    method, family, make_base, make_batch, tmp_path
):
    whole = get_pelt_model(make_base(family), METHODS[method]).train()
    optimizer = optimizer_of(whole)
    train(whole, make_batch(), optimizer, range(3), of=6)
    whole.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())  # its tensors are the optimizer's own
    expected = train(whole, make_batch(), optimizer, range(3, 6), of=6)
    again = PeltModel.from_pretrained(make_base(family), tmp_path, is_trainable=True).train()
    resumed = optimizer_of(again)
    resumed.load_state_dict(state)
    assert train(again, make_batch(), resumed, range(3, 6), of=6) == expected
    for name, parameter in whole.trained_parameters().items():
        assert torch.equal(again.trained_parameters()[name], parameter), name


@pytest.mark.parametrize("method", [m for m in METHODS if parts_of(METHODS[m]).mixture])
def test_merged_experts_are_saved_loaded_and_trained_on(
    method, make_base, make_batch, randomise, tmp_path
):
    batch = make_batch(with_labels=False)
    model = randomise(get_pelt_model(make_base(), METHODS[method])).eval()
    model.set_progress(1.0)
    model.save_pretrained(tmp_path / "experts")
    with torch.no_grad():
        expected = model(**batch).logits
    again = PeltModel.from_pretrained(make_base(), tmp_path / "experts", is_trainable=True)
    again.merge_experts()
    again.save_pretrained(tmp_path / "merged")
    merged = PeltModel.from_pretrained(make_base(), tmp_path / "merged", is_trainable=True)
    merged.eval()
    with torch.no_grad():
        assert torch.equal(merged(**batch).logits, expected)
    sizes = [
        (tmp_path / name / "pelt_model.safetensors").stat().st_size
        for name in ("experts", "merged")
    ]
    assert sizes[1] < sizes[0]
    losses = train(merged.train(), make_batch(), optimizer_of(merged), range(10), of=10)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("method", [m for m in METHODS if parts_of(METHODS[m]).pruning])
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_pruned_models_are_saved_loaded_and_exact(
    method, sparsity, make_base, make_batch, randomise, tmp_path
):
    config = with_part_changes(METHODS[method], PSTConfig, sparsity=sparsity)
    model = randomise(get_pelt_model(make_base(), config), std=0.05).eval()
    model.set_progress(1.0)
    model.save_pretrained(tmp_path)
    again = PeltModel.from_pretrained(make_base(), tmp_path)
    assert again.density() == model.density()
    entries = {
        n: m.weight.numel() for n, m in model.base_model.named_modules() if n in again.density()
    }
    for name, share in again.density().items():
        assert share == (entries[name] - int(entries[name] * sparsity)) / entries[name]
    with torch.no_grad():
        batch = make_batch(with_labels=False)
        assert torch.equal(again(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("is_autocast", [False, True])
@EVERY
def test_sixteen_bits_are_near_the_truth(method, is_autocast, make_base, make_batch, randomise):
    """In 16-bit weights, and under autocast: the loss, and a finite gradient everywhere."""
    batch = make_batch()
    exact = randomise(get_pelt_model(make_base(), METHODS[method]), std=0.05).train()
    dtype = torch.float32 if is_autocast else torch.bfloat16
    half = randomise(get_pelt_model(make_base(dtype=dtype), METHODS[method]), std=0.05).train()
    for model in (exact, half):
        model.set_progress(0.0)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        found = half(**batch)
    found.loss.backward()
    torch.manual_seed(1)
    torch.testing.assert_close(found.loss.float(), exact(**batch).loss, rtol=0.05, atol=0.02)
    used = [p for p in half.trained_parameters().values() if p.grad is not None]
    assert used and all(p.grad.isfinite().all() for p in used)
