"""What PEFT wrote is read with PEFT's outputs, or refused with the field that stands in the way."""

from __future__ import annotations

import json
from contextlib import nullcontext

import peft
import pytest
import torch
from families import make_writer
from safetensors.torch import load_file, save_file

from pelt_kernels.models import PeltModel

CLOSE = {"rtol": 0.0, "atol": 1e-5}
SEQ_CLS = {"task_type": "SEQ_CLS", "r": 4}
CAUSAL = {"task_type": "CAUSAL_LM", "r": 4}
# The family and PEFT's config.
LORAS = {
    "a list": ("bert", SEQ_CLS | {"target_modules": ["query", "value"], "lora_alpha": 3}),
    "an expression": ("bert", SEQ_CLS | {"target_modules": r".*\.0\..*(query|key)"}),
    "all-linear": ("roberta", SEQ_CLS | {"target_modules": "all-linear"}),
    "half of the head": ("distilbert", SEQ_CLS | {"target_modules": ["q_lin", "lin1"]}),
    "rsLoRA": ("bert", SEQ_CLS | {"target_modules": ["query"], "use_rslora": True}),
    "patterns": (
        "bert",
        SEQ_CLS
        | {
            "target_modules": ["query", "dense"],
            "rank_pattern": {"query": 2, "0.intermediate.dense": 3},
            "alpha_pattern": {"^bert.encoder.layer.1.output.dense": 40},
        },
    ),
    "layers": ("bert", SEQ_CLS | {"target_modules": ["query"], "layers_to_transform": [1]}),
    "all biases": ("bert", SEQ_CLS | {"target_modules": ["query"], "bias": "all"}),
    "LoRA's biases": ("bert", SEQ_CLS | {"target_modules": ["query"], "bias": "lora_only"}),
    "biases of branches": ("bert", SEQ_CLS | {"target_modules": ["value"], "lora_bias": True}),
    "modules_to_save": (
        "bert",
        {"r": 4, "target_modules": ["query"], "modules_to_save": ["classifier"]},
    ),
    "Conv1D": ("gpt2", CAUSAL | {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "llama": ("llama", CAUSAL | {"target_modules": "all-linear"}),
    "t5": ("t5", {"task_type": "SEQ_2_SEQ_LM", "r": 4, "target_modules": ["q", "v"]}),
}


@pytest.fixture
def made(make_base):
    """A tiny model of a family by its name."""

    def make(family):
        writers = ("gpt2", "llama", "t5")
        return make_writer(family) if family in writers else make_base(family)

    return make


@pytest.fixture
def written(made, tmp_path):
    """family, config -> a folder that PEFT wrote, with values for everything it trained, and the
    model that wrote it.
    """

    def write(family, config, **options):
        model = peft.get_peft_model(made(family), config).eval()
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
        model.save_pretrained(tmp_path, **options)
        return model, tmp_path

    return write


def batch_for(family, make_batch):
    batch = make_batch(with_labels=False)
    return batch | ({"decoder_input_ids": batch["input_ids"][:, :5]} if family == "t5" else {})


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", LORAS)
def test_lora_of_peft_gives_its_outputs(case, made, written, make_batch):
    family, fields = LORAS[case]
    writer, folder = written(family, peft.LoraConfig(**fields))
    batch = batch_for(family, make_batch)
    expected = writer(**batch).logits
    assert (made(family)(**batch).logits - expected).abs().max() > 0.1
    model = PeltModel.from_pretrained(made(family), folder)
    torch.testing.assert_close(model(**batch).logits, expected, **CLOSE)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_a_pickled_adapter_is_read_and_trains_on(made, written, make_batch):
    """Trained is what was trained there; saved again it is an adapter of this package."""
    config = peft.LoraConfig(**SEQ_CLS, target_modules=["query"], lora_dropout=0.1)
    writer, folder = written("bert", config, safe_serialization=False)
    assert not (folder / "adapter_model.safetensors").exists()
    model = PeltModel.from_pretrained(made("bert"), folder, is_trainable=True)
    assert model.method_config.targets == ("query",) and model.method_config.dropout == 0.1
    there = sum(p.numel() for p in writer.parameters() if p.requires_grad)
    assert model.get_nb_trainable_parameters()[0] == there
    model.eval().save_pretrained(folder / "own")
    again = PeltModel.from_pretrained(made("bert"), folder / "own")
    batch = make_batch(with_labels=False)
    torch.testing.assert_close(again(**batch).logits, writer(**batch).logits, **CLOSE)


# What PEFT's config says, what is then in its files, and what the sentence has to name.
REFUSED = {
    "DoRA": ({"use_dora": True}, {}, "use_dora=True"),
    "PiSSA": ({"init_lora_weights": "pissa"}, {}, "init_lora_weights.*'pissa'"),
    "another type": (
        {"peft_type": "IA3"},
        {},
        "peft_type as one of LORA, PREFIX_TUNING, got 'IA3'",
    ),
    "a later field": ({"use_magic": True}, {}, "use_magic=True"),
    "a saved embedding": ({}, {"bert.embeddings.word_embeddings.weight": (99, 32)}, "modules_to_"),
    "an unknown tensor": ({}, {"bert.nothing.weight": (3,)}, "bert.nothing.weight in .*not have"),
    "an unknown module": (
        {},
        {"bert.other.lora_A.weight": (4, 32), "bert.other.lora_B.weight": (32, 4)},
        "LoRA for modules of BertForSequenceClassification, got bert.other",
    ),
    "half a branch": ({}, {"bert.pooler.dense.lora_A.weight": (4, 32)}, "lora_B .*got .* and None"),
    "an embedding": ({}, {"bert.embeddings.lora_embedding_A": (4, 99)}, "lora_embedding_A"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_mapped_is_named_and_the_base_model_stays(case, made, written):
    _, folder = written("bert", peft.LoraConfig(**SEQ_CLS, target_modules=["query"]))
    fields, shapes, sentence = REFUSED[case]
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    path = folder / "adapter_model.safetensors"
    more = {f"base_model.model.{name}": torch.ones(shape) for name, shape in shapes.items()}
    save_file(load_file(path) | more, path)
    base = made("bert")
    before = {name: type(module) for name, module in base.named_modules()}
    with pytest.raises(ValueError, match=sentence) as raised:
        PeltModel.from_pretrained(base, folder)
    assert "\n" not in str(raised.value)
    assert {name: type(module) for name, module in base.named_modules()} == before
    assert all(parameter.requires_grad for parameter in base.parameters())


@pytest.mark.parametrize("content", ["", "text", "an object"])
def test_a_damaged_or_unsafe_pickle_is_refused(content, made, written):
    config = peft.LoraConfig(**SEQ_CLS, target_modules=["query"])
    _, folder = written("bert", config, safe_serialization=False)
    path = folder / "adapter_model.bin"
    if content == "an object":
        torch.save({"a": nullcontext()}, path)
    else:
        path.write_text(content)
    with pytest.raises(
        ValueError, match="adapter_model.bin cannot be read, it is damaged or holds"
    ):
        PeltModel.from_pretrained(made("bert"), folder)
