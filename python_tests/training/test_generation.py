"""Whole runs of models that write, and what `predict`, `export` and `--resume` make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_encoder import damage_json
from tiny_writers import pair_files, pairs, write_pairs, writers
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from pelt_kernels.cli import main
from pelt_kernels.models import PeltModel
from pelt_kernels.training import Example, Predictor, RunError, TrainConfig, train
from pelt_kernels.training.predictor import Card

__all__ = ["pair_files", "writers"]


def options(model: Path, files: tuple[Path, Path]) -> list[str]:
    return [
        "--task", str(files[0]), "--eval", str(files[1]), "--model", str(model), "--batch-size",
        "16", "--max-length", "12", "--device", "cpu", "--train-examples", "64", "--epochs", "1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(
    writers: dict[str, Path], pair_files: tuple[Path, Path], tmp_path_factory: Any
) -> dict[str, Path]:
    """Runs of LoRA, by family; read only."""
    folder = Path(tmp_path_factory.mktemp("written"))
    for family, model in writers.items():
        more = ["--method", "lora", "--eval-every", "2", "--output", str(folder / family)]
        assert main(["train", *options(model, pair_files), *more]) == 0
    return {family: folder / family for family in writers}


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_a_run_leaves_what_others_leave(trained: dict[str, Path], family: str) -> None:
    found = json.loads((trained[family] / "metrics.json").read_text())
    assert found["config"]["metric"] == "bleu" and found["task"]["problem"] == "generation"
    assert found["config"]["max_target_length"] == 6
    for name in ("bleu", "chrf", "rouge_l"):
        assert 0 <= found[name] <= 100
    assert 0 < found["trainable_parameters"] < found["total_parameters"]
    history = json.loads(next(trained[family].glob("lr-*/result.json")).read_text())["history"]
    evaluated = [entry for entry in history if "eval_bleu" in entry]
    assert len(evaluated) == 2 and all(entry["eval_loss"] > 0 for entry in evaluated)
    tested = [json.loads(line) for line in (trained[family] / "test_predictions.jsonl").open()]
    assert len(tested) == 40 and set(tested[0]) == {"text", "label", "predicted"}
    sources = {row["text"]: row["predicted"] for row in tested}
    assert all(row["predicted"] == sources[row["text"]] for row in tested)


def test_full_tuning_learns_to_write(
    writers: dict[str, Path], pair_files: tuple[Path, Path], tmp_path: Path
) -> None:
    config = TrainConfig(
        task=str(pair_files[0]), eval=str(pair_files[1]), model=str(writers["gpt2"]), lr=(3e-3,),
        method="full", epochs=3, batch_size=16, device="cpu", eval_every=12,
    )  # fmt: skip
    found = train(config, tmp_path)
    assert found["rouge_l"] > 55, "a random model reaches 10"


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_what_was_tested_is_predicted(
    trained: dict[str, Path], pair_files: tuple[Path, Path], family: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    adapter = str(trained[family] / "adapter")
    command = ["predict", "--adapter", adapter, "--device", "cpu"]
    assert main([*command, "--file", str(pair_files[1]), "--json"]) == 0
    out, err = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert set(rows[0]) == {"text", "expected", "written"}
    tested = [json.loads(line) for line in (trained[family] / "test_predictions.jsonl").open()]
    assert [row["written"] for row in rows] == [row["predicted"] for row in tested]
    found = json.loads((trained[family] / "metrics.json").read_text())
    assert f"BLEU {found['bleu']:.2f}, chrF {found['chrf']:.2f}" in err
    assert main([*command, "the red cat", "--beams", "2", "--max-new-tokens", "2"]) == 0
    written, source = capsys.readouterr()[0].rstrip("\n").split("\t")
    assert source == "the red cat" and len(written.split()) <= 2
    assert main([*command, "the red cat", "--attribute", "mood=calm"]) == 2
    assert "adapter's attributes (it has none), got 'mood=calm'" in capsys.readouterr()[1]
    assert main([*command, "the red cat", "--task", "a"]) == 2


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_padding_does_not_reach_what_is_written(trained: dict[str, Path], family: str) -> None:
    predictor = Predictor(trained[family] / "adapter", beams=2)
    examples = [Example(source, None, None, "") for source, *_ in pairs(8, seed=9)]
    together = predictor(examples).rows
    assert together == [predictor([example]).rows[0] for example in examples]


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_an_exported_model_writes_the_same(
    trained: dict[str, Path], tmp_path: Path, family: str
) -> None:
    adapter = trained[family] / "adapter"
    assert main(["export", "--adapter", str(adapter), "--output", str(tmp_path / "plain")]) == 0
    kind = AutoModelForCausalLM if family == "gpt2" else AutoModelForSeq2SeqLM
    plain = kind.from_pretrained(tmp_path / "plain").eval()
    predictor = Predictor(adapter)
    tuned = predictor.model
    assert isinstance(tuned, PeltModel)
    ids = torch.tensor([[3, 4, 7, 1], [3, 9, 8, 1]])
    more = {} if family == "gpt2" else {"decoder_input_ids": ids}
    with torch.inference_mode():
        expected = tuned(input_ids=ids, **more).logits
        assert torch.allclose(plain(input_ids=ids, **more).logits, expected, atol=1e-4)
    AutoTokenizer.from_pretrained(tmp_path / "plain")


def test_a_run_of_texts_is_resumed(
    writers: dict[str, Path], pair_files: tuple[Path, Path], trained: dict[str, Path]
) -> None:
    output = trained["gpt2"]
    before = (output / "adapter" / "pelt_model.safetensors").read_bytes()
    next(output.glob("lr-*/result.json")).unlink()
    assert main(["train", "--resume", "--output", str(output)]) == 0
    assert (output / "adapter" / "pelt_model.safetensors").read_bytes() == before


def test_a_card_of_texts_is_checked(trained: dict[str, Path], tmp_path: Path) -> None:
    card = Card.load(trained["t5"] / "adapter")
    card.save(tmp_path)
    assert Card.load(tmp_path) == card
    for key, text, sentence in (
        ("beams", "0", "expected max_target_length and beams >= 1, got 6 and 0"),
        ("attributes", '{"a": 1}', "expected attributes.a as a list of text, got 1"),
        ("tasks", '"a"', "expected tasks as a list of text, got 'a'"),
    ):
        card.save(tmp_path)
        damage_json(tmp_path / "task.json", key, text)
        with pytest.raises(RunError, match=sentence):
            Card.load(tmp_path)


WRONG = {
    "source with labels": (
        ["--source-column", "source", "--problem", "regression"],
        "problem: expected generation with a source or a target column, got 'regression'",
    ),
    "attributes": (["--attribute-column", "=mood"], "attribute-column: expected different names"),
    "metric": (["--metric", "f1"], "metric: expected one of bleu, chrf, rouge_l, got 'f1'"),
    "weights": (["--class-weights", "balanced"], "class-weights: expected none for a generation"),
    "beams": (["--beams", "0"], "beams: expected at least 1, got 0"),
    "method": (
        ["--attribute-column", "mood", "--method", "lora"],
        "method lora: expected a method that reads attributes, such as control_prefixes; without",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_options_are_one_sentence(
    writers: dict[str, Path], pair_files: tuple[Path, Path], tmp_path: Path, case: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    more, sentence = WRONG[case]
    output = ["--output", str(tmp_path / "out")]
    assert main(["train", *options(writers["t5"], pair_files), *output, *more]) == 2
    assert sentence in capsys.readouterr()[1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_control_prefixes_are_trained_on_attributes(
    writers: dict[str, Path], pair_files: tuple[Path, Path], tmp_path: Path, family: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    more = ["--method", "control_prefixes", "--set", "prefix_length=2", "--set", "mid=8"]
    more += ["--attribute-column", "mood", "--beams", "2", "--output", str(tmp_path / "out")]
    assert main(["train", *options(writers[family], pair_files), *more]) == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert dict(found["method_config"]["attributes"]) == {"mood": 2}
    assert found["task"]["attributes"] == {"mood": ["calm", "loud"]}
    capsys.readouterr()
    adapter = str(tmp_path / "out" / "adapter")
    command = ["predict", "--adapter", adapter, "--file", str(pair_files[1]), "--json"]
    assert main(command) == 0
    written = [json.loads(line)["written"] for line in capsys.readouterr()[0].splitlines()]
    tested = [json.loads(line) for line in (tmp_path / "out" / "test_predictions.jsonl").open()]
    assert written == [row["predicted"] for row in tested]


@pytest.mark.parametrize(("family", "method"), [("gpt2", "vlm"), ("t5", "hyperpelt")])
def test_methods_of_several_tasks_are_trained_on_a_column(
    writers: dict[str, Path], pair_files: tuple[Path, Path], tmp_path: Path, family: str,
    method: str, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    more = ["--method", method, "--task-column", "mood", "--output", str(tmp_path / "out")]
    assert main(["train", *options(writers[family], pair_files), *more]) == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["task"]["tasks"] == ["calm", "loud"] == list(found["method_config"]["tasks"])
    command = ["predict", "--adapter", str(tmp_path / "out" / "adapter"), "the red cat"]
    capsys.readouterr()
    assert main(command) == 2
    assert "expected the task, one of calm, loud, got none" in capsys.readouterr()[1]
    assert main([*command, "--task", "loud"]) == 0


def test_attributes_are_trained_on_and_asked_for(
    writers: dict[str, Path], pair_files: tuple[Path, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """With a model that only notes what it is given."""
    seen: list[tuple[str, Any]] = []
    forward, generate = PeltModel.forward, PeltModel.generate

    def note(name: str, call: Any) -> Any:
        def noting(self: Any, *args: Any, **inputs: Any) -> Any:
            seen.append((name, inputs.pop("attributes"), inputs.pop("tasks")))
            return call(self, *args, **inputs)

        return noting

    monkeypatch.setattr(PeltModel, "forward", note("forward", forward))
    monkeypatch.setattr(PeltModel, "generate", note("generate", generate))
    monkeypatch.setattr("pelt_kernels.models.wrapped._made", {})  # classes made of the old forward
    monkeypatch.setattr("pelt_kernels.training.config.conditioned", lambda config, _: config)
    more = ["--method", "lora", "--attribute-column", "tone=mood", "--task-column", "mood"]
    output = tmp_path / "out"
    arguments = ["train", *options(writers["t5"], pair_files), *more, "--output", str(output)]
    assert main(arguments) == 0
    assert {name for name, *_ in seen} == {"forward", "generate"}
    for _, attributes, tasks in seen:
        assert attributes["tone"].equal(tasks) and set(tasks.tolist()) <= {0, 1}
    card = Card.load(output / "adapter")
    assert card.attributes == {"tone": ("calm", "loud")} and card.attribute_columns == {
        "tone": "mood"
    }
    assert card.tasks == ("calm", "loud") and card.task_column == "mood"
    capsys.readouterr()
    command = ["predict", "--adapter", str(output / "adapter")]
    assert main([*command, "--file", str(pair_files[1])]) == 0
    seen.clear()
    given = ["--attribute", "tone=loud", "--task", "calm"]
    assert main([*command, "the red cat", "a dog", *given]) == 0
    assert seen[-1][1]["tone"].tolist() == [1, 1] and seen[-1][2].tolist() == [0, 0]
    angry = write_pairs(tmp_path / "angry.tsv", [*pairs(9, seed=1), ("the cat", "x", "angry")])
    wrong = {
        ("the red cat",): "argument 1: expected the attribute tone, one of calm, loud, got none",
        ("the red cat", "--attribute", "tone=angry"): "attribute tone 'angry' is not one of calm",
        ("--file", str(angry)): "line 11 of",
        ("the red cat", "--task", "angry"): "task: expected one of the adapter's (calm, loud), got",
    }
    for asked, sentence in wrong.items():
        capsys.readouterr()
        assert main([*command, *asked]) == 2
        assert sentence in capsys.readouterr()[1]
