"""Methods over bases that bitsandbytes or torchao quantised: their product, and parts beside it."""

from __future__ import annotations

import peft
import pytest
import torch
from closeness import assert_close
from peft.utils import prepare_model_for_kbit_training
from quantised_models import batch_for, dequantised, kinds, load, losses, make, needs, run
from torch import nn
from transformers import Trainer, TrainingArguments

from pelt_kernels import (
    AdaMixConfig,
    FullConfig,
    LoraConfig,
    PrefixTuningConfig,
    PSTConfig,
    UniPELTConfig,
    get_pelt_model,
)
from pelt_kernels.models import PeltModel

TARGETS = {"bert": ["query", "output.dense"], "llama": "all-linear"}
TASKS = {"bert": "SEQ_CLS", "llama": "CAUSAL_LM"}
METHODS = {
    "unipelt": ("bert", UniPELTConfig.apl()),
    "unipelt-decoder": ("llama", UniPELTConfig.apl()),
    "adamix": ("bert", AdaMixConfig()),
    "adamix-lora": ("bert", AdaMixConfig(kind="lora")),
    "lora-fused": ("gpt2", LoraConfig(targets=("query", "value", "ffn_out"), gated=True)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Where each family's model lies."""
    made = {}
    for family in ("bert", "llama", "gpt2"):
        made[family] = tmp_path_factory.mktemp(family)
        make(family).save_pretrained(made[family])
    return made


@pytest.mark.parametrize("kind", kinds("nf4", "llm-int8", "int8"))
def test_lora_trains_to_the_losses_of_peft(kind, folders, tmp_path):
    family = "bert" if kind == "llm-int8" else "llama"
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=TARGETS[family], task_type=TASKS[family]
    )
    theirs = peft.get_peft_model(load(folders[family], kind), config)
    theirs.save_pretrained(tmp_path)
    ours = PeltModel.from_pretrained(load(folders[family], kind), tmp_path, is_trainable=True)
    found, expected = losses(ours), losses(theirs)
    assert expected[-1] < 0.8 * expected[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@needs("bitsandbytes")
@pytest.mark.parametrize("method", METHODS)
def test_parts_are_those_over_a_base_with_the_same_numbers(method, folders, randomise):
    family, config = METHODS[method]
    ours = randomise(get_pelt_model(load(folders[family], "nf4"), config))
    plain = get_pelt_model(dequantised(load(folders[family], "nf4")), config)
    plain.load_state_dict(ours.state_dict())
    assert {p.dtype for p in ours.trained_parameters().values()} == {torch.float32}
    assert plain.get_nb_trainable_parameters() == ours.get_nb_trainable_parameters()
    found, baseline, truth = run(ours), run(plain), run(plain.double())
    assert found.keys() == truth.keys()
    assert_close(
        found.pop("logits"), baseline.pop("logits"), truth.pop("logits"), torch.float32, "logits"
    )
    gradients = [
        torch.cat([g.flatten() for g in each.values()]) for each in (found, baseline, truth)
    ]
    assert_close(*gradients, torch.float32, "gradients")


@pytest.mark.parametrize("kind", kinds("nf4", "llm-int8", "int8", "int4"))
def test_an_adapter_is_kept_and_taken_out(kind, folders, randomise, tmp_path):
    base = load(folders["bert"], kind)
    modules, state = dict(base.named_modules()), base.state_dict()
    ours = randomise(get_pelt_model(base, LoraConfig(r=4, targets="all-linear", dropout=0.1)))
    run(ours)  # with dropout
    ours.save_pretrained(tmp_path)
    again = PeltModel.from_pretrained(load(folders["bert"], kind), tmp_path, is_trainable=True)
    expected, found = run(ours), run(again)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(
        ValueError, match="floating-point weight, got the quantised one of .*Linear"
    ):
        ours.export_dense()
    if kind in ("nf4", "llm-int8"):
        with pytest.raises(ValueError, match="frozen=True of a base model with floating-point"):
            ours.state_dict(frozen=True)
    assert ours.remove() is base
    assert {name: id(m) for name, m in base.named_modules()} == {
        n: id(m) for n, m in modules.items()
    }
    left = base.state_dict()
    assert left.keys() == state.keys()


@needs("bitsandbytes")
def test_the_usual_recipe_of_qlora(folders, randomise, tmp_path):
    """Norms in float32, checkpointed layers, transformers.Trainer."""
    grads = []
    for checkpoints in (False, True):
        base = load(folders["llama"], "nf4", torch.bfloat16)
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=checkpoints)
        torch.manual_seed(2)
        model = get_pelt_model(base, LoraConfig(r=4, targets="all-linear"))
        assert model.model.norm.weight.dtype == torch.float32
        grads.append(run(randomise(model)))
    torch.testing.assert_close(grads[1], grads[0])
    rows = [dict(zip(batch_for(model), values)) for values in zip(*batch_for(model).values())]
    before = {name: p.detach().clone() for name, p in model.trained_parameters().items()}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, save_strategy="no", report_to="none", use_cpu=True
    )
    Trainer(model, arguments, train_dataset=rows).train()
    assert all(not torch.equal(p, before[name]) for name, p in model.trained_parameters().items())


@needs("bitsandbytes")
@pytest.mark.parametrize(
    ("config", "kept", "reason"),
    [
        (
            PSTConfig(),
            ["classifier"],
            "PSTConfig: expected floating-point weights, .* got bert.*quant",
        ),
        (FullConfig(), ["classifier"], "in place, got bert.*query.weight quantised in Linear4bit"),
        (LoraConfig(), ["query"], r"got classifier.weight quantised in Linear4bit; .*of a head"),
    ],
)
def test_what_would_write_into_a_quantised_weight_is_refused(config, kept, reason, folders):
    base = load(folders["bert"], "nf4", kept=kept)
    assert_refused(base, config, reason)


@pytest.mark.filterwarnings("ignore")
def test_other_quantised_layers_are_refused_by_their_class():
    base = torch.ao.quantization.quantize_dynamic(make("bert"), {nn.Linear}, torch.qint8)
    for config in (LoraConfig(), PrefixTuningConfig()):
        assert_refused(base, config, "got Linear of torch.ao.*or with bitsandbytes' .Linear4bit")


@needs("torchao")
def test_a_product_without_gradient_is_refused():
    from torchao import quantization as ao

    base = make("llama")
    config = ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4)
    ao.quantize_(base, config, lambda module, name: name.endswith("q_proj"))
    assert_refused(
        base, LoraConfig(), "IntxUnpackedToInt8Tensor, whose product gives .* no gradient"
    )


@needs("bitsandbytes")
def test_a_layer_that_is_not_quantised_yet_is_refused():
    import bitsandbytes as bnb

    base = make("llama")
    base.model.layers[1].self_attn.q_proj = bnb.nn.Linear4bit(64, 64, bias=False)
    assert_refused(base, LoraConfig(), "layers.1.*Linear4bit of bitsandbytes .* not quantised yet")


def assert_refused(base, config, reason):
    """With a sentence, and the model as it was."""
    before = [(name, id(module)) for name, module in base.named_modules()]
    with pytest.raises(ValueError, match=reason):
        get_pelt_model(base, config)
    assert [(name, id(module)) for name, module in base.named_modules()] == before
