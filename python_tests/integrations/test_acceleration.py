"""accelerate, accelerated and restore: what they change, what they leave, and what they refuse."""

from __future__ import annotations

import copy
import json
import pickle

import peft
import pytest
import torch
from lora_models import assert_same, pair, run, with_lora
from peft.tuners.lora import layer as lora

import pelt_kernels
from pelt_kernels.integrations import peft_lora
from pelt_kernels.integrations.peft_lora import AcceleratedLoraLinear

TARGETS = ["query", "value"]


@pytest.fixture
def model(make_model):
    return with_lora(make_model("bert"), target_modules=TARGETS)


def _kinds(model):
    return {type(module) for module in model.modules() if isinstance(module, lora.Linear)}


def _state(model):
    """What a call could have changed of a model's layers."""
    return [
        (type(module), sorted(module.__dict__), type(getattr(module, "config", None)))
        for module in model.modules()
    ]


def test_restore_leaves_no_trace(model):
    before = _state(model)
    pelt_kernels.accelerate(model)
    assert _state(model) != before
    pelt_kernels.restore(model)
    pelt_kernels.restore(model)
    assert _state(model) == before


def test_a_model_is_printed_as_before_and_peft_finds_its_layers(model):
    def shown():
        return repr(model), peft.get_layer_status(model), peft.get_model_status(model)

    before = shown()
    pelt_kernels.accelerate(model)
    assert shown() == before
    assert {status.module_type for status in before[1]} == {"lora.Linear"}


def test_a_second_call_changes_nothing_but_the_backend(model, batch):
    first = pelt_kernels.accelerate(model).served
    assert pelt_kernels.accelerate(model, backend="eager").served.items() <= first.items()
    assert len(first["lora_linear"]) == 4
    model.eval()
    pelt_kernels.ops.forget_choices()
    run(model, batch)
    assert {c.requested for c in pelt_kernels.explain("lora_linear")} == {"eager"}
    pelt_kernels.restore(model)
    assert _kinds(model) == {lora.Linear}


def test_a_block_ends_as_it_began(model):
    with pelt_kernels.accelerated(model) as report:
        assert report.count == 5  # with the model's attention
        assert _kinds(model) == {AcceleratedLoraLinear}
    assert _kinds(model) == {lora.Linear}
    pelt_kernels.accelerate(model, backend="eager")
    with pytest.raises(KeyError), pelt_kernels.accelerated(model, backend=None):
        raise KeyError
    assert _kinds(model) == {AcceleratedLoraLinear}
    assert {m.pelt_backend for m in model.modules() if isinstance(m, lora.Linear)} == {"eager"}
    with pelt_kernels.accelerated(model):
        pelt_kernels.restore(model)
    assert _kinds(model) == {lora.Linear}


def _by_pickle(model, _):
    return pickle.loads(pickle.dumps(model))


def _by_file(model, folder):
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)


@pytest.mark.parametrize("copied", [lambda model, _: copy.deepcopy(model), _by_pickle, _by_file])
def test_a_copy_is_accelerated_and_can_be_restored(copied, model, batch, tmp_path):
    pelt_kernels.accelerate(model, backend="eager")
    other = copied(model, tmp_path)
    assert _kinds(other) == {AcceleratedLoraLinear}
    assert_same(model, other, batch)
    pelt_kernels.restore(other)
    assert _kinds(other) == {lora.Linear}
    assert _kinds(model) == {AcceleratedLoraLinear}
    assert_same(model, other, batch)


def test_checkpoints_stay_pefts(model, make_model, batch, tmp_path):
    model, fast = pair(model)
    torch.testing.assert_close(fast.state_dict(), model.state_dict(), rtol=0, atol=0)
    for each, folder in ((model, "plain"), (fast, "fast")):
        each.save_pretrained(tmp_path / folder)
    plain, written = (tmp_path / "plain", tmp_path / "fast")
    names = sorted(path.name for path in plain.iterdir())
    assert names == sorted(path.name for path in written.iterdir())
    weights = "adapter_model.safetensors"
    assert (plain / weights).read_bytes() == (written / weights).read_bytes()
    configs = [json.loads((f / "adapter_config.json").read_text()) for f in (plain, written)]
    for config in configs:
        config["target_modules"].sort()  # written in the order of a set
    assert configs[0] == configs[1]
    read = peft.PeftModel.from_pretrained(make_model("bert"), tmp_path / "fast")
    assert torch.equal(read(**batch).logits, model.eval()(**batch).logits)


def test_layers_that_are_wrapped_later_need_another_call(model, batch):
    model, fast = pair(model)
    for each in (model, fast):
        torch.manual_seed(1)
        more = peft.LoraConfig(target_modules=["key"], r=2, init_lora_weights=False)
        each.add_adapter("more", more)
        each.set_adapter("more")
    assert_same(model, fast, batch)
    assert pelt_kernels.accelerate(fast).count == 7
    assert_same(model, fast, batch)


def test_layers_without_a_peft_model_around_them(make_model, batch):
    """What transformers and peft.inject_adapter_in_model make."""
    config = peft.LoraConfig(target_modules=["query"], init_lora_weights=False)
    model, fast = pair(peft.inject_adapter_in_model(config, make_model("bert")))
    assert _kinds(fast) == {AcceleratedLoraLinear}
    assert_same(model, fast, batch)


def _merged(model):
    model.merge_adapter()


def _on_meta(model):
    model.to("meta")


@pytest.mark.parametrize(
    ("spoil", "options", "sentence"),
    [
        (_merged, {}, "expected no merged adapter, got default in base_model.* unmerge_adapter()"),
        (_on_meta, {}, "expected weights in memory, got base_model.* on the meta device"),
        (None, {"backend": "fast"}, "accelerate: expected backend as one of .*, got 'fast'"),
        (None, {"backend": "cuda"}, "'cuda' was asked for but .* Able: .*eager"),
    ],
)
def test_a_refusal_changes_nothing(spoil, options, sentence, make_model):
    # float64, which no CUDA kernel takes, so that it is refused where there is a GPU too.
    model = with_lora(make_model("bert"), target_modules=TARGETS)
    if spoil is not None:
        spoil(model)
    before = _state(model)
    with pytest.raises(ValueError, match=sentence):
        pelt_kernels.accelerate(model, **options)
    assert _state(model) == before


def test_what_is_no_model_of_pefts_is_refused(make_model):
    with pytest.raises(
        ValueError, match="with adapters of PEFT's .*, got BertForSequ.* with none; make one with"
    ):
        pelt_kernels.accelerate(make_model("bert"))
    for call in (pelt_kernels.accelerate, pelt_kernels.restore):
        with pytest.raises(TypeError, match="expected model as a torch.nn.Module, got str"):
            call("bert-base-uncased")


@pytest.mark.parametrize("version", ["0.4.0", "99.0.0.dev0"])
def test_a_version_that_was_not_compared_is_refused(version, model, monkeypatch):
    monkeypatch.setattr(peft, "__version__", version)
    before = _state(model)
    with pytest.raises(ValueError, match=f"expected peft>=.*,<.*, got {version}"):
        pelt_kernels.accelerate(model)
    assert _state(model) == before


class _FailsAtLast(AcceleratedLoraLinear):
    attached = 0

    def pelt_attach(self):
        type(self).attached += 1
        if self.attached == 3:
            raise RuntimeError("the third one")


def test_an_error_half_way_undoes_all(model, monkeypatch):
    monkeypatch.setattr(peft_lora, "AcceleratedLoraLinear", _FailsAtLast)
    before = _state(model)
    with pytest.raises(RuntimeError, match="the third one"):
        pelt_kernels.accelerate(model)
    assert _state(model) == before


def test_a_subclass_of_somebody_elses_stays(model):
    class Other(lora.Linear):
        pass

    layer = next(m for m in model.modules() if isinstance(m, lora.Linear))
    layer.__class__ = Other
    report = pelt_kernels.accelerate(model)
    assert report.count == 4
    assert [*report.left_alone.values()] == [
        f"Other of {__name__} is not PEFT's LoRA beside a plain Linear"
    ]
    assert type(layer) is Other
