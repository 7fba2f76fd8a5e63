"""PEFT's LoRA over quantised bases, accelerated, against PEFT as shipped."""

from __future__ import annotations

import peft
import pytest
import torch
from quantised_models import kinds, load, losses, make, needs, run

import pelt_kernels

ALL = kinds("nf4", "llm-int8", "int8", "int4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a Llama lies."""
    made = tmp_path_factory.mktemp("llama")
    make("llama").save_pretrained(made)
    return made


def with_lora(base, **changes):
    options = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False} | changes
    torch.manual_seed(4)
    return peft.get_peft_model(base, peft.LoraConfig(**options))


@pytest.mark.parametrize("kind", ALL)
def test_outputs_gradients_and_training_are_those_of_peft(kind, folder):
    theirs = with_lora(load(folder, kind))
    ours = with_lora(load(folder, kind))
    report = pelt_kernels.accelerate(ours)
    layers = [n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert report.served == {"torch.addmm": tuple(layers)}
    assert not report.left_alone and not report.exceptions
    torch.testing.assert_close(run(ours), run(theirs))
    torch.testing.assert_close(losses(ours, 2), losses(theirs, 2), rtol=1e-5, atol=0)
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@needs("bitsandbytes")
@pytest.mark.parametrize(
    "changes",
    [{"lora_dropout": 0.3}, {"lora_bias": True}, {"use_rslora": True}, {"use_dora": True}],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_settings_of_peft_hold(dtype, changes, folder):
    options = {"target_modules": ["q_proj", "down_proj"]} | changes
    theirs = with_lora(load(folder, "nf4", dtype), **options)
    ours = with_lora(load(folder, "nf4", dtype), **options)
    pelt_kernels.accelerate(ours)
    torch.testing.assert_close(run(ours), run(theirs))


@pytest.mark.parametrize("kind", kinds("llm-int8", "int8"))
def test_branches_in_float32_are_rounded_where_peft_rounds_them(kind, folder):
    options = {"target_modules": ["q_proj", "down_proj"]}
    theirs = with_lora(load(folder, kind, torch.bfloat16), **options)
    ours = with_lora(load(folder, kind, torch.bfloat16), **options)
    pelt_kernels.accelerate(ours)
    expected = run(theirs)
    assert {value.dtype for value in expected.values()} == {torch.float32, torch.bfloat16}
    torch.testing.assert_close(run(ours), expected)


@needs("bitsandbytes")
def test_hooks_and_wide_branches_are_served(folder):
    """The base is called, which runs its hooks, and no kernel bounds the rank."""
    options = {"target_modules": ["q_proj"], "r": 257}
    theirs, ours = (with_lora(load(folder, "nf4"), **options) for _ in range(2))
    seen = []
    for module in ours.modules():
        if type(module).__name__ == "Linear4bit" and hasattr(module, "lora_A"):
            module.base_layer.register_forward_hook(lambda *call: seen.append(call))
    report = pelt_kernels.accelerate(ours)
    assert len(report.served["torch.addmm"]) == 2
    assert not report.left_alone and not report.exceptions
    torch.testing.assert_close(run(ours), run(theirs))
    assert len(seen) == 2


@needs("bitsandbytes")
def test_adapters_switched_disabled_and_mixed(folder):
    theirs, ours = with_lora(load(folder, "nf4")), with_lora(load(folder, "nf4"))
    for model in (theirs, ours):
        torch.manual_seed(5)
        model.add_adapter(
            "other", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        )
    pelt_kernels.accelerate(ours)
    ids = torch.arange(8).view(2, 4)
    for name in ("other", "default"):
        theirs.set_adapter(name), ours.set_adapter(name)
        torch.testing.assert_close(run(ours), run(theirs))
    mixed = {"adapter_names": ["other", "__base__"]}
    theirs.eval(), ours.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids, **mixed).logits, theirs(ids, **mixed).logits)
        with theirs.disable_adapter(), ours.disable_adapter():
            torch.testing.assert_close(ours(ids).logits, theirs(ids).logits)


@needs("bitsandbytes")
def test_it_is_undone_and_a_base_quantised_by_hand_is_served(folder):
    import bitsandbytes as bnb

    base = make("llama")
    for layer in base.model.layers:
        plain = layer.self_attn.q_proj
        layer.self_attn.q_proj = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
        layer.self_attn.q_proj.load_state_dict(plain.state_dict())
    model = with_lora(base.to("cpu"), target_modules=["q_proj", "v_proj"])
    kinds_before = [type(module) for module in model.modules()]
    expected = run(model)
    with pelt_kernels.accelerated(model) as report:
        assert {name: len(layers) for name, layers in report.served.items()} == {
            "torch.addmm": 2,
            "lora_linear": 2,
        }
        torch.testing.assert_close(run(model), expected)
    assert [type(module) for module in model.modules()] == kinds_before
