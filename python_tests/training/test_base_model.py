"""What a run takes from the model it starts from: the encoder, its limits, and no code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_encoder import rows, write_tsv
from transformers import AutoConfig, AutoModel, BertForSequenceClassification

from pelt_kernels.models.slots import longest_input
from pelt_kernels.training import Predictor, RunError, TrainConfig, UsageError, train
from pelt_kernels.training.base_model import load_classifier, load_tokenizer, longest_text

ENCODERS = (
    "albert", "bert", "camembert", "data2vec-text", "deberta-v2", "distilbert", "electra", "ernie",
    "mpnet", "roberta", "xlm-roberta",
)  # fmt: skip


def copy_model(folder: Path, target: Path, **config: Any) -> Path:
    """The model with other values in its config.json."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    path = target / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return target


@pytest.fixture
def classifier(tiny_model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The folder of a fine-tuned model with a number of labels and a kind of problem."""
    labels, problem = request.param
    folder = copy_model(tiny_model, tmp_path / "tuned")
    torch.manual_seed(3)
    BertForSequenceClassification.from_pretrained(
        tiny_model,
        num_labels=labels,
        problem_type=problem,
        output_hidden_states=True,
        id2label={number: f"old {number}" for number in range(labels)},
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "classifier",
    [(2, None), (2, "regression"), (6, "multi_label_classification"), (1, "regression")],
    indirect=True,
)
def test_the_head_is_fresh_whatever_the_folder_was_trained_for(
    tiny_model: Path, classifier: Path, tmp_path: Path
) -> None:
    old = BertForSequenceClassification.from_pretrained(classifier).state_dict()
    torch.manual_seed(0)
    model = load_classifier(str(classifier), classes=2)
    head = model.classifier.weight
    assert head.shape == (2, 32) and 0.1 < head.std() < 0.4  # initializer_range is 0.2
    assert old["classifier.weight"].shape != head.shape or not head.equal(old["classifier.weight"])
    assert model.classifier.bias.eq(0).all() and head.requires_grad
    for name, value in model.bert.state_dict().items():
        assert value.equal(old[f"bert.{name}"]), name
    torch.manual_seed(0)
    assert head.equal(load_classifier(str(classifier), classes=2).classifier.weight)
    torch.manual_seed(1)
    assert not head.equal(load_classifier(str(classifier), classes=2).classifier.weight)
    assert model.config.problem_type == "single_label_classification"
    assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    task = write_tsv(tmp_path / "a.tsv", rows(60, seed=0))
    config = TrainConfig(
        task=str(task), model=str(classifier), method="lora", epochs=1, device="cpu"
    )
    assert 0 <= train(config, tmp_path / "out")["accuracy"] <= 1


def test_an_encoder_of_other_sizes_than_its_config_is_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = copy_model(tiny_model, tmp_path, intermediate_size=48)
    with pytest.raises(RunError, match=r"expected bert\..* \[48.*\(from its config.json\), got \["):
        load_classifier(str(folder), classes=2)


@pytest.mark.parametrize("family", ENCODERS)
def test_each_family_reads_as_many_tokens_as_is_said_and_no_more(family: str) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        family, **sizes, intermediate_size=16, vocab_size=20, max_position_embeddings=12
    )
    model = AutoModel.from_config(config).eval()
    longest = longest_input(config)
    assert longest is not None
    assert model(input_ids=torch.full((1, longest), 5)).last_hidden_state.isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 5))


@pytest.fixture
def roberta(tiny_model: Path, tmp_path: Path) -> Path:
    """A model of 21 positions, 18 of which tokens can have."""
    folder = tmp_path / "roberta"
    shutil.copytree(tiny_model, folder)
    config = AutoConfig.for_model(
        "roberta", hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, vocab_size=64, max_position_embeddings=21, pad_token_id=2,
    )  # fmt: skip
    AutoModel.from_config(config).save_pretrained(folder)
    return folder


def test_texts_are_cut_where_the_positions_end(roberta: Path, tmp_path: Path) -> None:
    table = [(f"{text} {text} {text} " * 9, label) for text, label in rows(40, seed=0)]
    task = write_tsv(tmp_path / "a.tsv", table)
    config = TrainConfig(task=str(task), model=str(roberta), method="head", epochs=1, device="cpu")
    train(config, tmp_path / "out")
    adapter = tmp_path / "out" / "adapter"
    assert json.loads((adapter / "task.json").read_text())["max_length"] == 18
    (adapter / "task.json").write_text(
        (adapter / "task.json").read_text().replace('"max_length": 18', '"max_length": 19')
    )
    predictor = Predictor(adapter)
    assert predictor.max_length == 18 == longest_text(str(roberta), predictor.tokenizer)


@pytest.mark.parametrize("length", [1, 2, 19])
def test_a_length_that_cannot_be_is_refused(roberta: Path, tmp_path: Path, length: int) -> None:
    task = write_tsv(tmp_path / "a.tsv", rows(40, seed=0))
    config = TrainConfig(task=str(task), model=str(roberta), max_length=length, device="cpu")
    expected = "reads at most 18" if length > 18 else f"expected at least 3 .*, got {length}"
    with pytest.raises(UsageError, match=f"max-length: .*{expected}"):
        train(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pair_needs_room_for_a_token_of_each_text(tiny_model: Path, tmp_path: Path) -> None:
    table = [(f"{text}\tthis film", label) for text, label in rows(40, seed=0)]
    task = write_tsv(tmp_path / "a.tsv", table, "text\ttext_pair\tlabel")
    config = TrainConfig(task=str(task), model=str(tiny_model), max_length=4, device="cpu")
    with pytest.raises(UsageError, match="expected at least 5 .3 special tokens and one token of"):
        train(config, tmp_path / "out")


def test_a_tokenizer_without_padding_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = copy_model(tiny_model, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"pad_token": None}))
    with pytest.raises(UsageError, match="the tokenizer of .* has no padding token"):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("model_type", ["bert", "homemade"])
@pytest.mark.parametrize("load", [load_tokenizer, lambda name: load_classifier(name, 2)])
def test_code_in_a_model_folder_is_neither_asked_about_nor_run(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    load: Any,
) -> None:
    auto_map = {"AutoConfig": "own.Own", "AutoModelForSequenceClassification": "own.Own"}
    folder = copy_model(tiny_model, tmp_path / "model", auto_map=auto_map, model_type=model_type)
    marker = tmp_path / "was-run"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")

    def answer(prompt: str = "") -> str:
        raise AssertionError(f"asked: {prompt}")

    monkeypatch.setattr("builtins.input", answer)
    with pytest.raises(UsageError, match="asks for Python code of its own"):
        load(str(folder))
    assert not marker.exists()


def test_code_of_a_tokenizer_is_not_run_either(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_model(tiny_model, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    marker = tmp_path / "was-run"
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    monkeypatch.setattr("builtins.input", lambda prompt="": "y")
    try:
        load_tokenizer(str(folder))
    except RunError as error:
        assert "custom code" in str(error)
    assert not marker.exists()
