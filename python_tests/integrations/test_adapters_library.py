"""Layers of the library ``adapters``, accelerated, against the library as shipped.

The library wants an older transformers than the rest of the tests, so these run where it is
installed, in an environment of its own.
"""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from closeness import assert_close

import pelt_kernels

adapters = pytest.importorskip(
    "adapters", reason="adapters 1.3 needs transformers 4.57, in an environment of its own"
)

from adapters import composition as ac  # noqa: E402

from pelt_kernels.integrations import adapters_attention, adapters_layers  # noqa: E402
from pelt_kernels.ops.prefix_attention import without_prefix  # noqa: E402

UNIPELT = adapters.UniPELTConfig(
    adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=8, use_gating=True),
    adapters.SeqBnConfig(reduction_factor=4, use_gating=True),
    adapters.LoRAConfig(r=4, use_gating=True),
)
PREFIX = adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=8)
PARALLEL = adapters.ParBnConfig(reduction_factor=4, use_gating=True)
SEQUENTIAL = adapters.SeqBnConfig(reduction_factor=4)
DOUBLE = adapters.DoubleSeqBnConfig(reduction_factor=4)
LORA = adapters.LoRAConfig(r=4, alpha=6, intermediate_lora=True, output_lora=True)
# Each of two layers' attentions, without a prefix too; with one also what makes the prefixes.
SERVED = {
    "unipelt": (UNIPELT, {"lora_linear": 4, "prefix_attention": 3, "gated_adapter": 2}),
    "seq_bn": (SEQUENTIAL, {"gated_adapter": 2, "prefix_attention": 2}),
    "double_seq_bn": (DOUBLE, {"gated_adapter": 4, "prefix_attention": 2}),
    "par_bn": (PARALLEL, {"gated_adapter": 2, "prefix_attention": 2}),
    "lora": (LORA, {"lora_linear": 8, "prefix_attention": 2}),
    "prefix": (PREFIX, {"prefix_attention": 3}),
    "prefix_flat": (
        adapters.PrefixTuningConfig(prefix_length=3, flat=True),
        {"prefix_attention": 3},
    ),
    "mam": (adapters.MAMConfig(PREFIX, PARALLEL), {"prefix_attention": 3, "gated_adapter": 2}),
    "learned_scale": (
        adapters.SeqBnConfig(reduction_factor=4, scaling="learned", non_linearity="gelu_new"),
        {"gated_adapter": 2, "prefix_attention": 2},
    ),
}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
DROPS = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
KINDS = {
    "bert": (hf.BertForSequenceClassification, hf.BertConfig),
    "roberta": (hf.RobertaForSequenceClassification, hf.RobertaConfig),
    "xlm-roberta": (hf.XLMRobertaForSequenceClassification, hf.XLMRobertaConfig),
    "electra": (hf.ElectraForSequenceClassification, hf.ElectraConfig),
    "gpt2": (hf.GPT2ForSequenceClassification, hf.GPT2Config),
}


def _model(*configs, family="bert", active=None):
    """A model in eval mode with adapters a0, a1, ..., every one of whose parameters counts."""
    torch.manual_seed(0)
    kind, config = KINDS[family]
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "pad_token_id": 0}
    if family != "gpt2":
        sizes = SIZES | DROPS | {"intermediate_size": 48, "initializer_range": 0.2}
    model = kind(config(**sizes))
    adapters.init(model)
    names = [f"a{i}" for i in range(len(configs))]
    for name, config in zip(names, configs):
        model.add_adapter(name, config=config)
    model.train_adapter(active or ac.Stack(*names))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.double().eval()


@pytest.fixture(autouse=True)
def _on_operators(monkeypatch):
    """Models as small as these do not pay for the operators."""
    monkeypatch.setattr(adapters_layers, "PAYS_FROM", 0)


def test_small_calls_go_the_librarys_way(run, monkeypatch):
    model = _model(UNIPELT)
    expected = run(model)
    pelt_kernels.accelerate(model)
    monkeypatch.setattr(adapters_layers, "PAYS_FROM", 1 << 20)
    for name in ("lora_linear", "gated_adapter"):
        monkeypatch.setattr(adapters_layers, name, None)
    torch.testing.assert_close(run(model), expected)


@pytest.fixture
def run(batch):
    """A model's logits, and the gradients of all that is trained."""
    # Roberta's positions begin behind its padding.
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"].flip(1)}

    def run(model, **kwargs):
        model.zero_grad()
        out = model(**given | kwargs)
        loss = (out.logits * torch.linspace(-1, 1, out.logits.numel()).view_as(out.logits)).sum()
        loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return {"logits": out.logits.detach()} | grads

    return run


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta"])
@pytest.mark.parametrize("name", SERVED)
def test_outputs_and_gradients_are_the_librarys(name, family, run):
    config, served = SERVED[name]
    model = _model(config, family=family)
    expected, keys = run(model), list(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    report = pelt_kernels.accelerate(model)
    assert {operator: len(names) for operator, names in report.served.items()} == served
    assert report.left_alone == {}
    torch.testing.assert_close(run(model), expected)
    assert list(model.state_dict()) == keys
    pelt_kernels.restore(model)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.backend("cpu")
@pytest.mark.parametrize("is_padded", [True, False])
@pytest.mark.parametrize("name", ["lora", "seq_bn", "unipelt"])
def test_attention_is_the_kernels_on_a_cpu(name, is_padded, run, monkeypatch):
    """Of texts that end early they visit no padding: it is a mask of keys, and no bias."""
    monkeypatch.setattr(without_prefix, "PAYS_FROM", 0)
    given = {} if is_padded else {"attention_mask": None}

    def pair(model):
        return run(copy.deepcopy(model).float(), **given), run(model, **given)

    def another(seed):
        model = _model(SERVED[name][0])
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return pair(model)

    model = _model(SERVED[name][0])
    baseline, truth = pair(model)
    model.float()
    pelt_kernels.accelerate(model)
    asked = []

    def watched(*args, **options):
        asked.append(options)
        return pelt_kernels.prefix_attention(*args, **options)

    for module in (adapters_attention, without_prefix):
        monkeypatch.setattr(module, "prefix_attention", watched)
    found = run(model, **given)
    assert len(asked) == 2 and not any(options.get("bias") is not None for options in asked)
    assert all((options["key_mask"] is not None) == is_padded for options in asked)
    others = [another(seed) for seed in range(1, 5)]
    for key, value in found.items():
        near = ([each[key] for each in made] for made in others)
        assert_close(value, baseline[key], truth[key], torch.float32, key, near)


@pytest.mark.parametrize("family", ["electra", "gpt2"])
def test_what_is_left_alone_is_named(family, run):
    model = _model(UNIPELT, family=family)
    expected = run(model)
    report = pelt_kernels.accelerate(model)
    torch.testing.assert_close(run(model), expected)
    assert len(report.served["gated_adapter"]) == 2
    reasons = " ".join(report.left_alone.values())
    assert "SDPA attention are served" in reasons
    assert ("LoRAMergedLinear" in reasons) == (family == "gpt2")
    assert "prefix_attention" not in report.served


def test_lora_in_transposed_linears(run):
    model = _model(adapters.LoRAConfig(r=4, selfattn_lora=False, output_lora=True), family="gpt2")
    expected = run(model)
    assert len(pelt_kernels.accelerate(model).served["lora_linear"]) == 2
    torch.testing.assert_close(run(model), expected)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (adapters.IA3Config(), "IA3 is not plain LoRA"),
        (adapters.DoRAConfig(), "DoRA is not plain LoRA"),
        (adapters.CompacterConfig(reduction_factor=4, phm_dim=2), "its projections are PHMLayer"),
        (adapters.SeqBnConfig(reduction_factor=4, ln_after=True), "it has a norm of its own"),
        (adapters.SeqBnConfig(reduction_factor=4, non_linearity="mish"), "its activation is"),
        (adapters.SeqBnConfig(reduction_factor=4, scaling="channel"), "a scale for each channel"),
        (adapters.PromptTuningConfig(), "no operator computes what PromptTuningLayer does"),
        (adapters.SeqBnInvConfig(reduction_factor=4), "no operator computes what NICE"),
    ],
)
def test_other_methods_keep_their_way(config, reason, run):
    model = _model(config)
    expected = run(model)
    report = pelt_kernels.accelerate(model)
    assert all(reason in each for each in report.left_alone.values()) and report.left_alone
    torch.testing.assert_close(run(model), expected)


@pytest.mark.parametrize(
    "setup",
    [
        ac.Stack("a0", "a1"),
        ac.Fuse("a0", "a1"),
        ac.Parallel("a0", "a1"),
        ac.BatchSplit("a0", "a1", batch_sizes=[1, 1]),
        ac.Average("a0", "a1", weights=[0.3, 0.7]),
        None,
    ],
    ids=str,
)
def test_adapters_composed_in_other_ways(setup, run):
    model = _model(SEQUENTIAL, adapters.SeqBnConfig(reduction_factor=8, use_gating=True))
    model.add_adapter_fusion(["a0", "a1"])
    model.double().eval()
    model.active_adapters = setup
    expected = run(model)
    report = pelt_kernels.accelerate(model)
    assert any("fusion" in reason for reason in report.exceptions.values())
    torch.testing.assert_close(run(model), expected)


def test_a_stack_of_two_loras_feeds_one_into_the_other(run):
    model = _model(LORA, adapters.LoRAConfig(r=32, alpha=3, intermediate_lora=True))
    model.active_adapters = ac.Stack("a0")
    expected = run(model)
    pelt_kernels.accelerate(model)
    torch.testing.assert_close(run(model), expected)
    with adapters.AdapterSetup("a1"):
        accelerated = run(model)
        pelt_kernels.restore(model)
        torch.testing.assert_close(run(model), accelerated)


def test_gates_are_collected_as_by_the_library(run, batch):
    model = _model(UNIPELT)
    expected = model(**batch, output_adapter_gating_scores=True)
    pelt_kernels.accelerate(model)
    found = model(**batch, output_adapter_gating_scores=True)
    torch.testing.assert_close(found.logits, expected.logits)
    for layer, places in expected.adapter_gating_scores["a0"].items():
        for place, values in places.items():
            assert found.adapter_gating_scores["a0"][layer][place] == pytest.approx(values)


def test_training_with_dropout_draws_by_the_seed(run):
    config = adapters.MAMConfig(
        adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=8, dropout=0.3),
        adapters.ParBnConfig(reduction_factor=4, dropout=0.3),
    )
    model = _model(config, adapters.LoRAConfig(r=4, dropout=0.3))
    model.active_adapters = ac.Stack("a0", "a1")
    without = run(model)["logits"]
    pelt_kernels.accelerate(model)
    torch.testing.assert_close(run(model)["logits"], without)
    model.train()
    torch.manual_seed(3)
    once = run(model)["logits"]
    assert not torch.allclose(once, without)
    torch.manual_seed(3)
    assert torch.equal(run(model)["logits"], once)


def test_a_hook_inside_is_seen(run):
    model = _model(UNIPELT)
    expected = run(model)
    pelt_kernels.accelerate(model)
    seen = []
    for module in model.modules():
        if isinstance(module, adapters.methods.modeling.Adapter):
            module.adapter_up.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(run(model), expected)
    assert len(seen) == 2


def test_its_life_goes_on(run, tmp_path):
    """Added later, copied, ejected, saved, merged: as without."""
    model = _model(PREFIX)
    pelt_kernels.accelerate(model)
    model.add_adapter("later", config=LORA)
    report = pelt_kernels.accelerate(model)
    assert len(report.served["lora_linear"]) == 8 and report.count == 11
    model.double().eval()
    expected = run(model)
    torch.testing.assert_close(run(copy.deepcopy(model)), expected)
    model.save_adapter(str(tmp_path / "accelerated"), "a0")
    model.eject_prefix_tuning("a0")
    torch.testing.assert_close(run(model)["logits"], expected["logits"])
    pelt_kernels.restore(model)
    model.save_adapter(str(tmp_path / "restored"), "a0")
    torch.testing.assert_close(run(model)["logits"], expected["logits"])
    model.merge_adapter("later")
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="got later in .*reset_adapter"):
        pelt_kernels.accelerate(model)
    assert [type(module) for module in model.modules()] == kinds


def test_a_backend_that_is_asked_for(run):
    served = pelt_kernels.accelerate(_model(LORA), backend="eager").served
    assert list(served) == ["lora_linear"]  # attention without a prefix has kernels on a CPU alone
    model = _model(UNIPELT)
    expected = run(model)
    with pelt_kernels.integrations.accelerated(model, backend="eager"):
        torch.testing.assert_close(run(model), expected)
    with pytest.raises(ValueError, match="backend 'triton'"):
        pelt_kernels.accelerate(model, backend="triton")
    torch.testing.assert_close(run(model), expected)


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(adapters, "__version__", "2.0.0")
    with pytest.raises(ValueError, match="expected adapters>=1.3,<1.4.* got 2.0.0"):
        pelt_kernels.accelerate(_model(SEQUENTIAL))
