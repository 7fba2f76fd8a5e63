"""What an experiment leaves behind, and that the methods learn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_encoder import rows, write_csv

from pelt_kernels.models import PeltModel
from pelt_kernels.nn import PrunedLinear
from pelt_kernels.training import (
    Example,
    Predictor,
    RunError,
    TrainConfig,
    UsageError,
    Watchers,
    train,
)
from pelt_kernels.training.base_model import load_classifier
from pelt_kernels.training.recipes import RECIPES


def config_for(tiny_model: Path, toy_files: tuple[Path, Path], **changes: object) -> TrainConfig:
    base = {
        "task": str(toy_files[0]), "eval": str(toy_files[1]), "model": str(tiny_model),
        "epochs": 2, "batch_size": 8, "max_length": 16, "device": "cpu",
    }  # fmt: skip
    return TrainConfig(**base | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", RECIPES)
def test_every_method_trains_and_reports(
    tiny_model: Path, toy_files: tuple[Path, Path], tmp_path: Path, method: str
) -> None:
    said: list[str] = []
    options = ("adapter.placement=parallel", "bitfit=true") if method == "composite" else ()
    config = config_for(tiny_model, toy_files, method=method, options=options)
    found = train(config, tmp_path, watchers=Watchers(say=said.append))
    on_disk = json.loads((tmp_path / "metrics.json").read_text())
    assert on_disk == json.loads(json.dumps(found))
    for key in ("accuracy", "f1", "matthews", "seconds_per_step", "peak_memory_bytes"):
        assert found[key] is not None, key
    assert found["hardware"]["threads"] >= 1 and found["torch"]
    assert found["learning_rate"] == RECIPES[method].lr
    assert 0 < found["trainable_parameters"] <= found["total_parameters"]
    has_network = method in ("prefix", "mam", "adamix", "control_prefixes")
    is_less = has_network or method.startswith("unipelt")
    assert is_less == (found["stored_parameters"] < found["trainable_parameters"])
    used = {
        "unipelt": {"gated_adapter", "prefix_attention", "lora_linear"},
        "adapter": {"gated_adapter"}, "prefix": {"prefix_attention"}, "lora": {"lora_linear"},
        "composite": {"gated_adapter"}, "mam": {"gated_adapter", "prefix_attention"},
        "adamix": {"gated_adapter", "symmetric_kl"}, "pst": {"masked_weight"},
        "bitfit": set(), "head": set(), "full": set(),
    }  # fmt: skip
    if method in used:
        assert set(found["backends"]) == used[method]
    assert found["method_config"] == config.method_for().to_dict()
    assert all(name for name in found["backends"].values())
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "gates.png").exists() == method.startswith("unipelt")
    (described,) = [sentence for sentence in said if "early stopping" in sentence]
    assert "held out of train.tsv" in described and "test.tsv" in described


@pytest.mark.parametrize("method", ["adamix", "pst", "bitfit", "composite", "mam"])
def test_pairs_of_texts_are_trained_on(tiny_model: Path, tmp_path: Path, method: str) -> None:
    table = [(text, " ".join(text.split()[::-1]), label) for text, label in rows(60, seed=4)]
    file = write_csv(tmp_path / "pairs.csv", table, ("sentence1", "sentence2", "label"))
    options = ("lora.r=2", "pst.targets=ffn_in", "bitfit=true") if method == "composite" else ()
    config = TrainConfig(
        task=str(file), model=str(tiny_model), method=method, options=options, epochs=1,
        batch_size=8, max_length=24, device="cpu",
    )  # fmt: skip
    found = train(config, tmp_path / "out")
    assert 0 <= found["accuracy"] <= 1 and found["seeds"][0]["steps"] > 0


def test_full_tuning_learns_the_toy_task(
    tiny_model: Path, toy_files: tuple[Path, Path], tmp_path: Path
) -> None:
    config = config_for(tiny_model, toy_files, method="full", lr=(3e-3,), epochs=8, seeds=(2,))
    assert train(config, tmp_path)["accuracy"] > 0.9


def test_gates_are_followed_over_training(
    tiny_model: Path, toy_files: tuple[Path, Path], tmp_path: Path
) -> None:
    train(config_for(tiny_model, toy_files, method="unipelt", lr=(1e-2,)), tmp_path)
    (result,) = tmp_path.glob("lr-*/result.json")
    history = json.loads(result.read_text())["history"]
    gates = [entry["gates"] for entry in history if "loss" in entry]
    assert len(gates) > 10
    kinds = {"adapter", "prefix", "lora_query", "lora_value"}
    assert set(gates[0]) == {f"{layer}.{kind}" for layer in (0, 1) for kind in kinds}
    assert all(0 < value < 1 for entry in gates for value in entry.values())
    assert gates[0] != gates[-1]


def test_the_saved_adapter_predicts_what_was_tested(
    tiny_model: Path, toy_files: tuple[Path, Path], tmp_path: Path
) -> None:
    train(config_for(tiny_model, toy_files, method="unipelt"), tmp_path)
    tested = [json.loads(line) for line in (tmp_path / "test_predictions.jsonl").open()]
    predictor = Predictor(tmp_path / "adapter")
    examples = [Example(row["text"], None, None, "") for row in tested]
    alone = [predictor([example]).rows[0] for example in examples[:5]]
    together = predictor(examples).rows
    assert [row["predicted"] for row in tested] == [prediction.label for prediction in together]
    for one, many in zip(alone, together, strict=False):  # padding does not reach a prediction
        assert one.probabilities == pytest.approx(many.probabilities, abs=1e-5)
    assert sum(together[0].probabilities.values()) == pytest.approx(1)


def test_pruned_weights_are_made_once_for_prediction(
    tiny_model: Path, toy_files: tuple[Path, Path], tmp_path: Path
) -> None:
    config = config_for(
        tiny_model, toy_files, method="pst", options=("sparsity=0.5",), epochs=1, lr=(3e-3,)
    )
    train(config, tmp_path)
    predictor = Predictor(tmp_path / "adapter")
    assert not any(isinstance(module, PrunedLinear) for module in predictor.model.modules())
    examples = [Example(text, None, None, "") for text, _ in rows(5, seed=6)]
    found = [row.probabilities for row in predictor(examples).rows]
    base = load_classifier(str(tiny_model), 2)
    predictor.model = PeltModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert found == [row.probabilities for row in predictor(examples).rows]


def test_the_test_part_is_held_out_where_none_is_given(
    tiny_model: Path, toy_files: tuple[Path, Path], tmp_path: Path
) -> None:
    said: list[str] = []
    config = config_for(tiny_model, toy_files, method="head", eval=None, epochs=1)
    found = train(config, tmp_path, watchers=Watchers(say=said.append))
    assert found["task"]["sources"]["test"] == "held out of train.tsv"
    assert found["task"]["examples"]["test"] == 20
    tested = {json.loads(line)["text"] for line in (tmp_path / "test_predictions.jsonl").open()}
    assert tested <= {text for text, _ in rows(200, seed=1)}


def test_long_texts_are_noted_once(
    tiny_model: Path, toy_files: tuple[Path, Path], tmp_path: Path
) -> None:
    said: list[str] = []
    config = config_for(tiny_model, toy_files, method="head", max_length=6, epochs=1, seeds=(0, 1))
    train(config, tmp_path, watchers=Watchers(say=said.append))
    assert len([sentence for sentence in said if "longer than 6 tokens" in sentence]) == 1


def test_a_length_beyond_the_model_is_refused(
    tiny_model: Path, toy_files: tuple[Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="reads at most 64 tokens, not 65"):
        train(config_for(tiny_model, toy_files, max_length=65), tmp_path)


@pytest.mark.parametrize("model", ["/nowhere/model", "./nowhere"])
def test_a_missing_model_folder_is_one_sentence(tmp_path: Path, model: str) -> None:
    with pytest.raises(UsageError, match="model: there is no folder"):
        train(TrainConfig(model=model), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_damaged_model_is_one_sentence(tiny_model: Path, tmp_path: Path) -> None:
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(RunError, match="cannot be loaded: ") as error:
        train(TrainConfig(model=str(tmp_path)), tmp_path / "run")
    assert "\n" not in str(error.value)
