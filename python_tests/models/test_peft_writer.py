"""What is written in PEFT's files has the same outputs there, and back here."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from families import WRITERS, make_writer
from safetensors.torch import load_file

from pelt_kernels.methods import (
    BottleneckAdapterConfig,
    CompositeConfig,
    HeadConfig,
    LoraConfig,
    PrefixTuningConfig,
)
from pelt_kernels.models import PeltModel, get_pelt_model

CLOSE = {"rtol": 0.0, "atol": 1e-5}
PREFIX = PrefixTuningConfig(prefix_length=5, mid=8, shift_positions=True)
WRITTEN = {
    "two places": ("bert", LoraConfig(r=4)),
    "every Linear and LoRA's biases": (
        "bert",
        LoraConfig(r=4, targets="all-linear", use_rslora=True, alpha=2, bias="lora_only"),
    ),
    "all biases": ("bert", CompositeConfig(lora=LoraConfig(r=4), bitfit=True)),
    "two ranks": ("roberta", LoraConfig(r=4, targets=("query", "ffn_out"), rank_pattern={"query": 2})),
    "one layer": ("distilbert", LoraConfig(r=4, targets=("query",), layers=(1,))),
    "projections of one Linear": ("gpt2", LoraConfig(r=4, rank_pattern={"query": 2})),
    "llama": ("llama", LoraConfig(r=4, targets="all-linear")),
    "a prefix in gpt2": ("gpt2", PREFIX),
    "a prefix in llama": ("llama", PREFIX),
}  # fmt: skip


@pytest.fixture
def made(make_base):
    """A tiny model of a family by its name."""
    return lambda family: make_writer(family) if family in WRITERS else make_base(family)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", WRITTEN)
def test_peft_reads_what_is_written_for_it(case, made, make_batch, randomise, tmp_path):
    family, config = WRITTEN[case]
    model = randomise(get_pelt_model(made(family), config), std=0.1).eval()
    batch = make_batch(with_labels=False)
    expected = model(**batch).logits
    assert (made(family)(**batch).logits - expected).abs().max() > 0.05
    model.save_pretrained(tmp_path, format="peft")
    there = peft.PeftModel.from_pretrained(made(family), tmp_path).eval()
    torch.testing.assert_close(there(**batch).logits, expected, **CLOSE)
    again = PeltModel.from_pretrained(made(family), tmp_path)
    torch.testing.assert_close(again(**batch).logits, expected, **CLOSE)


def test_servers_find_plain_names(made, tmp_path):
    """What those read that have no PEFT: its keys, ends of names as targets, no pattern."""
    config = LoraConfig(r=4, targets=("q_proj", "v_proj"))
    get_pelt_model(made("llama"), config).save_pretrained(tmp_path, format="peft")
    start = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors[f"{start}A.weight"].shape == (4, 32)
    assert tensors[f"{start}B.weight"].shape == (32, 4) and len(tensors) == 8
    described = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 16}
    expected |= {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {}, "bias": "none"}
    expected |= {"modules_to_save": None}
    assert {key: described[key] for key in expected} == expected


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("projection", [False, True])
def test_prefixes_of_peft_give_its_outputs(family, projection, made, make_batch, tmp_path):
    """Positions count from behind the prefix, also where a cache has the earlier words."""
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=4,
        prefix_projection=projection,
        encoder_hidden_size=8,
    )
    writer = peft.get_peft_model(made(family), config).eval()
    for parameter in writer.prompt_encoder.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    writer.save_pretrained(tmp_path)
    model = PeltModel.from_pretrained(made(family), tmp_path)
    batch = make_batch(with_labels=False)
    expected = writer(**batch).logits
    torch.testing.assert_close(model(**batch).logits, expected, **CLOSE)
    words = torch.arange(5, 12)[None]
    first = model(input_ids=words[:, :4], use_cache=True)
    then = model(input_ids=words[:, 4:], past_key_values=first.past_key_values)
    torch.testing.assert_close(then.logits, writer(input_ids=words).logits[:, 4:], **CLOSE)
    unshifted = model.from_pretrained(made(family), tmp_path)
    with unshifted.disable_adapter():
        plain = made(family)(**batch).logits
        assert torch.equal(unshifted(**batch).logits, plain)


# A family, a method that PEFT's files cannot hold, and the reason.
REFUSED = {
    "gates": ("bert", LoraConfig(r=4, gated=True), "LoRA with gates"),
    "an adapter": ("bert", BottleneckAdapterConfig(bottleneck=4), "an adapter"),
    "neither": ("bert", HeadConfig(), "neither"),
    "two parts": ("llama", CompositeConfig(lora=LoraConfig(r=4), prefix=PREFIX), "in one"),
    "an encoder": ("bert", PrefixTuningConfig(prefix_length=2), "no decoder"),
    "positions": ("llama", PrefixTuningConfig(prefix_length=2), "shift_positions=True. trains"),
    "skipped layers": (
        "llama",
        PrefixTuningConfig(prefix_length=2, skip_layers=(0,), shift_positions=True),
        "skip_layers",
    ),
    "both stacks": ("t5", PrefixTuningConfig(prefix_length=2), "an encoder-decoder"),
    "a window": ("mistral", PREFIX, "sliding window"),
    "words": (
        "llama",
        CompositeConfig(lora=LoraConfig(r=4), trainable_tokens=(7,)),
        "trainable_tokens",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_cannot_hold_is_refused(case, made, tmp_path):
    family, config, reason = REFUSED[case]
    model = get_pelt_model(made(family), config)
    with pytest.raises(ValueError, match=f"format='peft', got .*{reason}"):
        model.save_pretrained(tmp_path / "out", format="peft")
    assert not (tmp_path / "out").exists()


def test_a_folder_has_one_adapter(made, tmp_path):
    model = get_pelt_model(made("bert"), LoraConfig(r=4))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="without pelt_config.json for format='peft'"):
        model.save_pretrained(tmp_path, format="peft")
    with pytest.raises(ValueError, match="format as one of pelt, peft, got 'gguf'"):
        model.save_pretrained(tmp_path, format="gguf")


@pytest.mark.parametrize("family", ["t5", "mistral"])
def test_prefixes_of_peft_that_mean_something_else_are_refused(family, made, tmp_path):
    task = "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    config = peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=2)
    peft.get_peft_model(made(family), config).save_pretrained(tmp_path)
    reason = "an encoder-decoder" if family == "t5" else "sliding window"
    with pytest.raises(ValueError, match=reason):
        PeltModel.from_pretrained(made(family), tmp_path)


def test_shifted_positions_want_a_decoder(made):
    with pytest.raises(ValueError, match="a decoder that takes position_ids with shift_positions"):
        get_pelt_model(made("bert"), PREFIX)
