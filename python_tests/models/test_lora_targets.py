"""LoRA on modules by name, in models of known families and of others, beside PEFT's own."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from families import WORDS, make_writer
from torch import nn

from pelt_kernels import CompositeConfig, LoraConfig, UniPELTConfig, get_pelt_model
from pelt_kernels.methods import AdaMixConfig, BottleneckAdapterConfig, PSTConfig, parts_of
from pelt_kernels.models import PeltModel
from pelt_kernels.models.allocation import check_size
from pelt_kernels.models.lora_targets import layer_number, matching

PEFT_PAIRS = {
    "llama": ("all-linear", {}),
    "llama-regex": (r".*\.(q|v)_proj", {}),
    "llama-patterns": (
        ("q_proj", "v_proj", "down_proj"),
        {
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 3},
            "alpha_pattern": {r"layers\.0.*v_proj": 5.0},
            "use_rslora": True,
        },
    ),
    "llama-layers": (("q_proj", "up_proj"), {"layers": (1,), "exclude": ("mlp.up_proj",)}),
    "gpt2": ("all-linear", {}),
    "gpt2-names": (("c_attn", "mlp.c_proj"), {}),
    "t5": ("all-linear", {"exclude": r"decoder.*\.wo"}),
    "t5-names": (("q", "SelfAttention.v"), {}),
    "gpt_neox": ("all-linear", {}),
    "opt": (("q_proj", "fc1", "project_in"), {}),
    "falcon": ("all-linear", {}),
}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": WORDS}
STRANGERS = {
    "gpt_neox": (hf.GPTNeoXConfig, hf.GPTNeoXForCausalLM, SIZES | {"intermediate_size": 48}),
    "opt": (
        hf.OPTConfig, hf.OPTForCausalLM,
        SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 16, "dropout": 0.0},
    ),
    "falcon": (hf.FalconConfig, hf.FalconForCausalLM, SIZES),
}  # fmt: skip


def make_model(kind: str):
    """A model of a family that `slots` knows, or of another, in eval mode."""
    family = kind.partition("-")[0]
    if family not in STRANGERS:
        return make_writer(family)
    torch.manual_seed(0)
    config_class, model_class, sizes = STRANGERS[family]
    model = model_class(config_class(**sizes))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def inputs_of(seed: int = 1) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, WORDS, (3, 9), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def beside_peft(kind: str):
    """Both models, and for each branch's factor of ours PEFT's parameter of the same values."""
    peft = pytest.importorskip("peft")
    targets, options = PEFT_PAIRS[kind]
    ours = get_pelt_model(make_model(kind), LoraConfig(r=4, alpha=6.0, targets=targets, **options))
    named = {"exclude": "exclude_modules", "layers": "layers_to_transform"}
    theirs_options = {
        named.get(key, key): list(value) if isinstance(value, tuple) else value
        for key, value in options.items()
    }
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=targets if isinstance(targets, str) else list(targets),
        **theirs_options,
    )
    theirs = peft.get_peft_model(make_model(kind), config)
    wanted = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    pairs = []
    for name, parameter in ours.trained_parameters().items():
        path, _, side = name.removeprefix("base_model.").rpartition(".lora_")
        other = wanted.pop(f"base_model.model.{path}.lora_{side.upper()}.default.weight")
        pairs.append((parameter, other))
    assert not wanted and pairs
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter, other in pairs:
            assert parameter.shape == other.shape
            other.copy_(parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator)))
    return ours, theirs, pairs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", PEFT_PAIRS)
def test_logits_and_gradients_are_those_of_peft(kind):
    ours, theirs, pairs = beside_peft(kind)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    with torch.no_grad():
        plain = make_model(kind)(**inputs_of()).logits
    logits = []
    for model in (ours.train(), theirs.train()):
        outputs = model(**inputs_of())
        outputs.loss.backward()
        logits.append(outputs.logits)
    assert (logits[0] - plain).abs().max() > 1e-2
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    for mine, other in pairs:
        assert mine.grad.any()
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["llama", "llama-patterns", "gpt2", "t5", "opt"])
def test_three_steps_are_those_of_peft(kind):
    """In float64: AdamW divides by a gradient's own size, which makes rounding a step."""
    ours, theirs, pairs = beside_peft(kind)
    start = [mine.detach().clone() for mine, _ in pairs]
    for i, model in enumerate((ours.double().train(), theirs.double().train())):
        optimizer = torch.optim.AdamW([pair[i] for pair in pairs], lr=1e-2)
        for step in range(3):
            optimizer.zero_grad()
            model(**inputs_of(step)).loss.backward()
            optimizer.step()
    for (mine, other), first in zip(pairs, start):
        assert (mine - first).abs().max() > 1e-3
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", [*STRANGERS, "gpt2", "llama"])
def test_it_comes_back_from_files_and_goes_bit_for_bit(kind, tmp_path):
    targets = ("c_attn", "mlp.c_fc") if kind == "gpt2" else "all-linear"
    base = make_model(kind)
    first = {name: value.clone() for name, value in base.state_dict().items()}
    with torch.no_grad():
        untouched = base(**inputs_of()).logits
    config = LoraConfig(r=4, targets=targets, alpha_pattern={".*": 3.0})
    model = get_pelt_model(base, config)
    assert set(first) <= set(base.state_dict())
    with torch.no_grad():
        for parameter in model.trained_parameters().values():
            parameter.add_(0.1 * torch.randn_like(parameter))
        logits = model(**inputs_of()).logits
        assert (logits - untouched).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    again = PeltModel.from_pretrained(make_model(kind), tmp_path)
    assert again.method_config == config
    with torch.no_grad():
        assert torch.equal(again(**inputs_of()).logits, logits)
        with again.disable_adapter():
            assert torch.equal(again(**inputs_of()).logits, untouched)
    if kind == "falcon":  # its Linear is of a class with a forward of its own
        with pytest.raises(ValueError, match="got FalconLinear with another one"):
            again.export_dense()
    else:
        with torch.no_grad():
            found = again.export_dense()(**inputs_of()).logits
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(model)(**inputs_of()).logits, logits)
    back = model.remove()
    assert back is base and list(back.state_dict()) == list(first)
    for name, value in back.state_dict().items():
        assert torch.equal(value, first[name]), name
    get_pelt_model(back, config).remove()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_layers_of_an_unknown_family_give_the_same_gradients(use_reentrant):
    gradients = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        model = get_pelt_model(make_model("gpt_neox"), LoraConfig(targets="all-linear")).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(**inputs_of()).loss.backward()
        gradients.append({name: p.grad for name, p in model.trained_parameters().items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_what_one_branch_and_its_gate_cover():
    """By its module's name all columns of a Linear; by a projection's name its own."""
    whole = get_pelt_model(make_model("gpt2"), LoraConfig(r=4, targets=("c_attn",), gated=True))
    factors = whole.get_submodule("base_model.transformer.h.0.attn.c_attn")
    assert list(factors.lora_b.shape) == [96, 4]
    part = get_pelt_model(
        make_model("gpt2"), LoraConfig(r=4, targets=("query",), rank_pattern={"query": 2})
    )
    own = part.get_submodule("base_model.transformer.h.0.attn.c_attn").branches.query
    assert list(own.lora_b.shape) == [32, 2]
    whole.record_gates()
    whole(**inputs_of())
    assert list(whole.gate_values()) == [(0, "lora_c_attn"), (1, "lora_c_attn")]


def test_a_name_of_a_place_is_the_same_by_its_modules_name():
    models = []
    for targets in (("query", "ffn_out"), ("q_proj", "down_proj"), r".*\.(q|down)_proj"):
        torch.manual_seed(3)
        config = LoraConfig(r=4, targets=targets, gated=True)
        models.append(get_pelt_model(make_model("llama"), config))
        models[-1].record_gates()
        models[-1](**inputs_of())
    first, *others = models
    for other in others:
        assert list(first.gate_values()) == list(other.gate_values())
        parameters = dict(other.named_parameters())  # the state also says by which names
        assert parameters.keys() == dict(first.named_parameters()).keys()
        for name, value in parameters.items():
            assert torch.equal(value, first.get_parameter(name))


def test_all_linear_leaves_the_trained_head_and_the_words_alone(make_base):
    model = get_pelt_model(make_base(), LoraConfig(r=2, targets="all-linear"))
    inside = {n.rpartition(".lora_")[0] for n in model.trained_parameters() if ".lora_" in n}
    assert "base_model.bert.pooler.dense" in inside
    assert not any("classifier" in name for name in inside) and len(inside) == 13
    ours = get_pelt_model(make_model("opt"), LoraConfig(targets="all-linear"))
    assert not any("lm_head" in name for name in ours.trained_parameters())


def test_parts_without_a_family_go_with_it(make_base):
    config = CompositeConfig(
        lora=LoraConfig(targets=("query_key_value",)), bitfit=True, trainable_tokens=(7,)
    )
    model = get_pelt_model(make_model("gpt_neox"), config)
    model(**inputs_of()).loss.backward()
    for name, parameter in model.trained_parameters().items():
        assert parameter.grad is not None, name


LINEARS = r"LlamaForCausalLM has the Linears q_proj, k_proj, .*or its places \(query, key"
REFUSED = {
    rf"got 'qproj'; {LINEARS}": ("llama", LoraConfig(targets=("q_proj", "qproj"))),
    r"got '.\*qproj'; LlamaForCausalLM has the Linears": ("llama", LoraConfig(targets=".*qproj")),
    "self_attn, which is LlamaAttention; ": ("llama", LoraConfig(targets=("self_attn",))),
    "other than the output embeddings, got lm_head": ("llama", LoraConfig(targets=("lm_head",))),
    "output embeddings, got lm_head; OPT": ("opt", LoraConfig(targets=("lm_head",))),
    "embed_tokens, which is Embedding": ("llama", LoraConfig(targets=("embed_tokens",))),
    "got 'query'; GPTNeoXForCausalLM has the Linears query_key_value, dense": (
        "gpt_neox", LoraConfig(),
    ),
    "exclude with names of modules, got 'x'": (
        "llama", LoraConfig(targets="all-linear", exclude=("x",)),
    ),
    "exclude, layers and the trained head leave, got none": (
        "llama", LoraConfig(targets=("q_proj",), exclude=".*attn.*"),
    ),
    r"layers that have targets in them, got \[7\]": ("llama", LoraConfig(layers=(0, 7))),
    "rank_pattern for modules among the targets, got 'k_proj'": (
        "llama", LoraConfig(targets=("q_proj",), rank_pattern={"k_proj": 2}),
    ),
    "c_attn by its own name or by those": ("gpt2", LoraConfig(targets=("query", "c_attn"))),
    "needs none": ("gpt_neox", LoraConfig(targets="all-linear", gated=True)),
    "a model of one of the families": ("opt", UniPELTConfig()),
    "families .*got FalconForCausalLM": (
        "falcon",
        CompositeConfig(lora=LoraConfig(targets="all-linear"), adapter=BottleneckAdapterConfig()),
    ),
    "got lora and pst for model.layers.0.mlp.down_proj": (
        "llama",
        CompositeConfig(
            lora=LoraConfig(targets=("down_proj",)), pst=PSTConfig(targets=("ffn_out",))
        ),
    ),
    "got lora and adamix for model.layers.0.self_attn.q_proj": (
        "llama", CompositeConfig(lora=LoraConfig(targets="all-linear"),
                                 adamix=AdaMixConfig(kind="lora")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_fits_nothing_is_one_sentence_and_changes_nothing(sentence):
    kind, config = REFUSED[sentence]
    base = make_model(kind)
    before = [(name, id(module)) for name, module in base.named_modules()]
    with pytest.raises(ValueError, match=sentence) as raised:
        get_pelt_model(base, config)
    assert "\n" not in str(raised.value)
    assert before == [(name, id(module)) for name, module in base.named_modules()]


def test_a_gate_outside_of_the_layers_is_refused(make_base):
    with pytest.raises(ValueError, match="gates find the mask, got bert.pooler.dense; exclude"):
        get_pelt_model(make_base(), LoraConfig(targets="all-linear", gated=True))
    config = LoraConfig(r=2, targets="all-linear", gated=True, exclude=("pooler.dense",))
    model = get_pelt_model(make_base(), config)
    assert sum(name.endswith("gate.weight") for name in model.trained_parameters()) == 12


def _quantised(model):
    dense = model.gpt_neox.layers[1].mlp.dense_h_to_4h
    dense.weight = nn.Parameter(dense.weight.detach().to(torch.int8), requires_grad=False)


def _other_class(model):
    class PackedLinear(nn.Module):
        in_features, out_features = 32, 48

    model.gpt_neox.layers[1].mlp.dense_h_to_4h = PackedLinear()


def _tied(model):
    first, second = (layer.mlp.dense_h_to_4h for layer in model.gpt_neox.layers)
    second.weight = first.weight


def _inside_attention(model):
    model.gpt_neox.layers[1].extra = nn.MultiheadAttention(32, 2)


NOT_PLAIN = {
    r"layers.1.mlp.dense_h_to_4h as .*got a weight of torch.int8; .*quantization": _quantised,
    r"layers.1.mlp.dense_h_to_4h as .*got PackedLinear of .*quantization": _other_class,
    "layers.0.mlp.dense_h_to_4h, which shares them with .*layers.1.*exclude it": _tied,
    "extra.out_proj, whose weight MultiheadAttention reads itself; exclude it": _inside_attention,
}


@pytest.mark.parametrize("sentence", NOT_PLAIN)
def test_linears_that_no_branch_can_stand_beside_are_named(sentence):
    base = make_model("gpt_neox")
    NOT_PLAIN[sentence](base)
    with pytest.raises(ValueError, match=sentence):
        get_pelt_model(base, LoraConfig(targets="all-linear"))
    if NOT_PLAIN[sentence] is not _quantised:
        get_pelt_model(base, LoraConfig(targets="all-linear", exclude=r".*(h_to_4h|extra.*)"))


def test_absurd_sizes_in_a_file_are_refused_without_memory(tmp_path):
    config = LoraConfig(r=2, targets="all-linear")
    model = get_pelt_model(make_model("gpt_neox"), config)
    tensors = dict(model.trained_parameters())
    check_size(make_model("gpt_neox"), config, tensors, tmp_path)
    absurd = LoraConfig(r=2, targets="all-linear", rank_pattern={"dense": 256})
    with pytest.raises(ValueError, match="expected the sizes in the config of .* to be those"):
        check_size(make_model("gpt_neox"), absurd, tensors, tmp_path)


def test_names_are_matched_as_peft_matches_them():
    modules = ["h.0.attn.c_attn", "h.0.attn", "h.0.mlp.c_proj", "h.1.attn.c_proj", "c_proj"]
    assert matching(("c_proj",), modules) == modules[2:]
    assert matching(("attn.c_proj", "attn"), modules) == ["h.0.attn", "h.1.attn.c_proj"]
    assert matching(r"h\.\d+\.attn", modules) == ["h.0.attn"]
    assert [layer_number(name) for name in modules] == [0, 0, 0, 1, None]
    assert parts_of(LoraConfig(targets="all-linear")).lora.places == ()
