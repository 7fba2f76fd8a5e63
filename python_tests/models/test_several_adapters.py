"""Several adapters of one model: taking turns, and their files."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch

from pelt_kernels import (
    BitFitConfig,
    FullConfig,
    LoraConfig,
    PeltModel,
    PSTConfig,
    UniPELTConfig,
    get_pelt_model,
)

CONFIGS = {
    "default": LoraConfig(r=3),
    "gated": UniPELTConfig.apl(),
    "biases": BitFitConfig(),
    "sparse": PSTConfig(sparsity=0.5),
}


@pytest.fixture
def several(make_base, make_batch, randomise):
    """A model with four adapters of four methods, and the logits of each as the only one."""
    model, alone = None, {}
    for seed, (name, config) in enumerate(CONFIGS.items()):
        only = randomise(get_pelt_model(make_base(dtype=torch.float64), config), seed=seed).eval()
        only.set_progress(1.0)
        alone[name] = only(**make_batch()).logits.detach()
        if model is None:
            model = get_pelt_model(make_base(dtype=torch.float64), config)
        else:
            model.add_adapter(name, config)
        model.set_adapter(name)
        randomise(model, seed=seed).set_progress(1.0)
        # A part that was made later started from other random numbers.
        with torch.no_grad():
            values = only.trained_parameters()
            for key, parameter in model.trained_parameters().items():
                parameter.copy_(values[key])
    return model.eval(), alone


def _check_each(model, alone, batch):
    for name, logits in alone.items():
        model.set_adapter(name)
        assert torch.equal(model(**batch).logits, logits), name


def test_each_adapter_computes_what_it_does_alone(several, make_base, make_batch):
    model, alone = several
    batch = make_batch()
    assert list(model.adapter_configs.items()) == list(CONFIGS.items())
    _check_each(model, alone, batch)
    _check_each(model, dict(reversed(alone.items())), batch)
    _check_each(copy.deepcopy(model), alone, batch)
    _check_each(pickle.loads(pickle.dumps(model)), alone, batch)
    assert model.active_adapter == "default" and model.active_adapters == ["default"]
    base = make_base(dtype=torch.float64)
    removed = model.remove()
    assert removed.state_dict().keys() == base.state_dict().keys()
    for name, value in base.state_dict().items():
        assert torch.equal(removed.state_dict()[name], value), name
    assert all(parameter.requires_grad for parameter in removed.parameters())


def test_the_files_of_each_adapter_are_those_of_it_alone(several, make_base, make_batch, tmp_path):
    model, alone = several
    model.save_pretrained(tmp_path / "all")
    model.save_pretrained(tmp_path / "two", selected_adapters=["gated", "biases"])
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"gated", "biases"}
    assert model.active_adapter == "sparse"
    for name, logits in alone.items():
        folder = tmp_path / "all" / ("" if name == "default" else name)
        only = PeltModel.from_pretrained(make_base(dtype=torch.float64), folder)
        assert torch.equal(only(**make_batch()).logits, logits), name
        model.set_adapter(name)
        assert model.state_dict().keys() == only.state_dict().keys()
    again = PeltModel.from_pretrained(
        make_base(dtype=torch.float64), tmp_path / "all" / "gated", adapter_name="gated"
    )
    again.load_adapter(tmp_path / "all", "default", is_trainable=True)
    again.load_adapter(tmp_path / "all" / "sparse", "sparse")
    assert again.active_adapter == "gated"
    _check_each(again, {n: y for n, y in alone.items() if n != "biases"}, make_batch())
    again.set_adapter("default")
    assert all(p.requires_grad for p in again.trained_parameters().values())
    again.set_adapter("gated")
    assert not any(p.requires_grad for p in again.parameters())
    # Into one that is there, without making it the active one.
    with torch.no_grad():
        model.set_adapter("gated")
        for parameter in model.trained_parameters().values():
            parameter.zero_()
    model.set_adapter("default")
    model.load_adapter(tmp_path / "all" / "gated", "gated")
    assert model.active_adapter == "default"
    _check_each(model, alone, make_batch())


def test_only_the_active_adapter_is_trained(make_base, make_batch):
    model = get_pelt_model(make_base(), LoraConfig(r=3)).train()
    model.add_adapter("gated", UniPELTConfig.apl())
    for name in ("gated", "default"):
        model.set_adapter(name)
        trained = model.trained_parameters()
        assert {k for k, p in model.named_parameters() if p.requires_grad} == trained.keys()
        assert all(p.grad is None for p in model.parameters())
        before = {key: value.detach().clone() for key, value in model.named_parameters()}
        optimizer = torch.optim.SGD(trained.values(), lr=1.0)
        model(**make_batch()).loss.backward()
        optimizer.step()
        for key, value in model.named_parameters():
            assert key in trained or (torch.equal(value, before[key]) and value.grad is None)
        assert not torch.equal(trained[HEAD], before[HEAD])


HEAD = "base_model.classifier.weight"


def test_what_waits_moves_with_the_model(several, make_batch):
    model, alone = several
    model.float()
    for name, logits in alone.items():
        model.set_adapter(name)
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert torch.allclose(model(**make_batch()).logits.double(), logits, atol=1e-4)


def test_an_adapter_that_is_not_active_can_be_deleted(several, make_batch):
    model, alone = several
    model.set_adapter("gated")
    before = sum(1 for _ in model.parameters())
    model.delete_adapter("default")
    assert sum(1 for _ in model.parameters()) < before
    assert list(model.adapter_configs) == ["gated", "biases", "sparse"]
    _check_each(model, {n: y for n, y in alone.items() if n != "default"}, make_batch())
    model.add_adapter("default", LoraConfig())
    model.set_adapter("default")


def test_what_is_refused_leaves_everything_as_it_was(several, make_base, make_batch, tmp_path):
    model, alone = several
    known = "default, gated, biases, sparse"

    def refuse(call, match, error=ValueError):
        with pytest.raises(error, match=match) as raised:
            call()
        assert "\n" not in str(raised.value)
        assert list(model.adapter_configs) == list(CONFIGS) and model.active_adapter == "sparse"

    refuse(lambda: model.set_adapter("other"), f"set_adapter: .* adapters {known}, got 'other'")
    refuse(lambda: model.delete_adapter("other"), f"delete_adapter: .*{known}, got 'other'")
    refuse(
        lambda: model.save_pretrained(tmp_path, selected_adapters=["other"]),
        f"save_pretrained: .*{known}, got 'other'",
    )
    refuse(
        lambda: model.save_pretrained(tmp_path, state_dict={}, selected_adapters=["gated"]),
        "expected selected_adapters to be the active adapter, 'sparse', .* got gated",
    )
    refuse(lambda: model.delete_adapter("sparse"), "active one, 'sparse'; .*default, gated, biases")
    refuse(lambda: model.add_adapter("gated", LoraConfig()), "got 'gated', which the model has")
    for name in ("a.b", "", "__base__", "a/b", 3):
        add = partial(model.add_adapter, name, LoraConfig())
        refuse(add, "letters, digits, _ and -, and not")
    refuse(lambda: model.add_adapter("new", {"r": 3}), "UniPELTConfig.apl.., got dict", TypeError)
    refuse(lambda: model.add_adapter("new", FullConfig()), "got 'full', which trains it in place")
    refuse(lambda: model.add_adapter("new", LoraConfig(targets=("nothing",))), "got 'nothing'")
    refuse(lambda: model.load_adapter(tmp_path, "new"), "found none", FileNotFoundError)
    get_pelt_model(make_base(), LoraConfig(r=3)).save_pretrained(tmp_path)
    refuse(lambda: model.load_adapter(tmp_path, "gated"), "use PeltModel.from_pretrained")
    weights = tmp_path / "pelt_model.safetensors"
    get_pelt_model(
        make_base(intermediate_size=52), LoraConfig(targets=("ffn_out",))
    ).save_pretrained(tmp_path)
    refuse(lambda: model.load_adapter(tmp_path, "new"), r"lora_a \[8, 48\] .*got \[8, 52\]")
    weights.write_bytes(weights.read_bytes()[:-9])
    refuse(lambda: model.load_adapter(tmp_path, "new"), "damaged or cut short")
    with model.disable_adapter():
        refuse(lambda: model.set_adapter("gated"), "expected the method to be in the model")
    _check_each(model, alone, make_batch())


def test_the_only_adapter_and_full_fine_tuning_stand_alone(make_base):
    model = get_pelt_model(make_base(), LoraConfig(), "mine")
    with pytest.raises(ValueError, match="'mine'; it is the only one, and remove"):
        model.delete_adapter("mine")
    model = get_pelt_model(make_base(), FullConfig())
    with pytest.raises(ValueError, match="add_adapter: .*got 'full'"):
        model.add_adapter("more", LoraConfig())
