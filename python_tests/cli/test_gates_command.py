"""`pelt-kernels gates`: its numbers against forwards of the model, its page, and wrong input."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from command import Outcome, options
from tiny_encoder import damage_json, rows, write_tsv
from transformers import AutoModel

from pelt_kernels.training import Predictor
from pelt_kernels.training.gate_report.findings import findings

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@pytest.fixture(scope="session")
def report(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report on the finished run; read only."""
    from pelt_kernels.cli import main

    output = tmp_path_factory.mktemp("gates")
    assert main(["gates", str(trained), "--output", str(output), "--device", "cpu"]) == 0
    return output


def numbers(folder: Path) -> dict:
    return json.loads((folder / "gates.json").read_text())


def one_by_one(run: Path) -> list[dict]:
    """Each text of the run's test part alone: its label, loss, probability and gates."""
    predictor = Predictor(run / "adapter")
    predictor.model.record_gates()
    config = json.loads((run / "run.json").read_text())
    lines = Path(config["eval"]).read_text().splitlines()[1:]
    found = []
    for line in lines:
        text, label = line.split("\t")
        batch = predictor.tokenizer(text, return_tensors="pt", truncation=True, max_length=16)
        with torch.inference_mode():
            probabilities = predictor.model(**batch).logits[0].double().softmax(0)
        number = predictor.card.labels.index(label)
        gates = {gate: float(value[0]) for gate, value in predictor.model.gate_values().items()}
        found.append(
            {
                "label": label,
                "is_right": int(probabilities.argmax()) == number,
                "loss": -float(probabilities[number].log()),
                "length": batch["input_ids"].shape[1],
                "gates": gates,
            }
        )
    return found


def test_the_numbers_are_those_of_single_forwards(report, trained):
    found, alone = numbers(report), one_by_one(trained)
    assert found["rows"] == {"train.tsv, test part": len(alone)}
    assert found["ablation"]["score"] == pytest.approx(np.mean([row["is_right"] for row in alone]))
    assert found["ablation"]["loss"] == pytest.approx(
        np.mean([row["loss"] for row in alone]), rel=1e-5
    )
    assert len(found["gates"]) == len(alone[0]["gates"]) == 8  # four kinds in two layers
    for gate in found["gates"]:
        values = np.array([row["gates"][gate["layer"], gate["kind"]] for row in alone])
        close = {"rel": 1e-4, "abs": 1e-6}
        assert gate["mean"] == pytest.approx(values.mean(), **close)
        assert gate["std"] == pytest.approx(values.std(), rel=1e-3, abs=1e-6)
        assert (gate["least"], gate["most"]) == pytest.approx((values.min(), values.max()), **close)
        for label, summary in gate["by_label"].items():
            chosen = values[[row["label"] == label for row in alone]]
            assert summary["rows"] == len(chosen)
            assert summary["mean"] == pytest.approx(chosen.mean(), **close)


def test_each_text_has_a_row(report, trained):
    with (report / "gates.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    for row, alone in zip(table, one_by_one(trained), strict=True):
        assert (row["label"], int(row["length"])) == (alone["label"], alone["length"])
        assert (row["label"] == row["predicted"]) == alone["is_right"]
        assert float(row["loss"]) == pytest.approx(alone["loss"], rel=1e-3, abs=1e-6)
        for (layer, kind), value in alone["gates"].items():
            assert float(row[f"{layer}.{kind}"]) == pytest.approx(value, rel=1e-4)


def test_what_works_at_a_threshold_is_counted_over_the_texts(report, trained):
    found, alone = numbers(report)["active"], one_by_one(trained)
    model = Predictor(trained / "adapter").model
    assert found["trained"] == sum(p.numel() for p in model.trained_parameters().values())
    assert found["stored"] == model.get_nb_stored_parameters() < found["trained"]
    gates = np.array([list(row["gates"].values()) for row in alone])
    for row in found["thresholds"]:
        assert row["parts"] == pytest.approx((gates >= row["threshold"]).mean())
    whole, *_, last = found["thresholds"]
    assert [whole["threshold"], last["threshold"]] == [0.0, 0.5]
    assert whole["parameters"] == found["stored"] > last["parameters"]
    assert whole["added_flops"] > last["added_flops"] and whole["base_flops"] == last["base_flops"]
    sentences = numbers(report)["findings"]["active"]
    assert (
        f"{found['trained']:,} parameters are trained and {found['stored']:,} stored"
        in sentences[0]
    )
    page = Page((report / "gates.html").read_text())
    assert f"{last['parameters']:,.0f}" in page.words and " ".join(sentences) in page.words


def test_the_history_is_that_of_the_run(report, trained):
    (result,) = trained.glob("lr-*/result.json")
    entries = [e for e in json.loads(result.read_text())["history"] if e.get("gates")]
    assert numbers(report)["history"] == [{k: e[k] for k in ("step", "gates")} for e in entries]


def test_two_reports_are_equal(report, trained, tmp_path, run):
    outcome = run("gates", trained, "--output", tmp_path, "--device", "cpu")
    assert outcome.code == 0 and "mean gates on train.tsv" in outcome.out
    assert (tmp_path / "gates.json").read_bytes() == (report / "gates.json").read_bytes()
    assert not list(tmp_path.glob(".partial*"))


def test_several_files_are_compared(trained, tmp_path, run):
    files = [write_tsv(tmp_path / f"{n}.tsv", rows(12 + n, seed=n)) for n in (5, 6)]
    outcome = run("gates", trained, "--task", files[0], "--task", files[1], "-o", tmp_path)
    assert outcome.code == 0
    found = numbers(tmp_path)
    assert found["rows"] == {"5": 17, "6": 18}
    assert "task" in found["relations"]["traits"]
    assert {name: s["rows"] for name, s in found["gates"][0]["by_task"].items()} == found["rows"]


def ablation(folder: Path) -> dict[tuple[str, str], dict]:
    return {(row["of"], row["change"]): row for row in numbers(folder)["ablation"]["rows"]}


def test_every_kind_of_gate_is_altered_and_every_part_removed(report):
    changes = ("0", "0.5", "1", "own mean", "shuffled")
    kinds = ("adapter", "lora_query", "lora_value", "prefix", "all gates")
    parts = [(part, "removed") for part in ("adapter", "prefix", "lora")]
    found = ablation(report)
    assert list(found) == [(kind, change) for kind in kinds for change in changes] + parts
    untouched = numbers(report)["ablation"]
    for row in found.values():
        score, loss = row["difference"]["value"], row["loss_difference"]["value"]
        assert score == pytest.approx(row["score"] - untouched["score"])
        assert loss == pytest.approx(row["loss"] - untouched["loss"])
    closed, removed = found["adapter", "0"], found["adapter", "removed"]
    assert closed["loss"] == pytest.approx(removed["loss"], rel=1e-6)
    # A prefix that is closed keeps its share of the softmax.
    closed, removed = found["prefix", "0"], found["prefix", "removed"]
    assert abs(closed["loss"] - removed["loss"]) > 1e-5


def with_gates(run: Path, folder: Path, model: Path, **gates: tuple[float, float]) -> Path:
    """A copy of a run's adapter with other gates: of each kind a weight on the first direction of
    the input, and a bias.
    """
    predictor = Predictor(run / "adapter", str(model))
    kinds = {"adapter.gate": "adapter", "extra_gates.prefix": "prefix", "query.gate": "lora_query"}
    for name, parameter in predictor.model.trained_parameters().items():
        kind = next((kinds[part] for part in kinds if f"{part}." in name), None)
        if kind in gates:
            weight, bias = gates[kind]
            parameter.data.zero_()
            parameter.data[0] = bias if name.endswith("bias") else weight
    predictor.model.save_pretrained(folder)
    predictor.card.save(folder)
    return folder


def test_a_planted_relation_is_found_and_a_constant_is_none(
    trained, tiny_model, toy_files, tmp_path, run
):
    """A base model whose tokens tell their position, and a gate that reads it: longer texts have
    larger gates. A gate without a weight is the same for every text.
    """
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    model = AutoModel.from_pretrained(base)
    embedding = model.embeddings.position_embeddings.weight.data
    embedding[:, 0] = 0.3 * (torch.arange(len(embedding)) - 8)
    model.save_pretrained(base)
    adapter = with_gates(trained, tmp_path / "planted", base, prefix=(3.0, 0.0), adapter=(0.0, 0.4))
    outcome = run(
        "gates", adapter, "--model", base, "--task", toy_files[1], "--output", tmp_path
    )  # fmt: skip
    assert outcome.code == 0, outcome
    found = {(gate["layer"], gate["kind"]): gate for gate in numbers(tmp_path)["gates"]}
    length = found[0, "prefix"]["relations"]["length"]
    assert length["is_found"] and length["value"] > 0.9
    for layer in (0, 1):
        constant = found[layer, "adapter"]
        assert constant["mean"] == pytest.approx(torch.tensor(0.4).sigmoid().item(), rel=1e-5)
        for relation in constant["relations"].values():
            assert relation == {"value": 0.0, "p": 1.0, "is_found": False}
    rows = ablation(tmp_path)
    for change in ("own mean", "shuffled"):
        row = rows["adapter", change]
        assert row["difference"] == {"value": 0.0, "interval": [0.0, 0.0], "is_effect": False}
        assert row["loss_difference"]["value"] == pytest.approx(0.0, abs=1e-6)
    assert numbers(tmp_path)["history"] == []  # of an adapter alone


class Page(HTMLParser):
    """The ids of sections, the text, and what a page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        given = dict(attributes)
        if tag == "section":
            self.ids.append(given["id"])
        self.loads += [v for k, v in given.items() if k in ("src", "href") and v != "data:,"]
        assert tag != "script"

    def handle_data(self, data: str) -> None:
        self.words += data


SECTIONS = ["openness", "relations", "distributions", "worth", "active", "drift", "method"]


def test_the_page_stands_alone_and_says_what_was_found(report):
    text = (report / "gates.html").read_text()
    page, found = Page(text), numbers(report)
    assert page.ids == SECTIONS and not page.loads
    assert "url(" not in text and "http" not in text and "@import" not in text
    for sentence in (found["findings"]["headline"], found["findings"]["lead"]):
        assert sentence in page.words
    for gate in found["gates"]:
        assert f"{gate['mean']:.2f}" in page.words


@pytest.mark.parametrize("low, ending", [
    (-0.03, "no effect is shown."),
    (0.01, "no effect that stands out among {count} comparisons."),
])  # fmt: skip
def test_why_no_effect_is_shown_fits_the_interval_beside_it(report, low, ending):
    found = numbers(report)
    rows = found["ablation"]["rows"]
    whole = {"value": 0.02, "interval": [low, 0.04], "is_effect": False}
    for row in rows:
        row["difference"] = row["loss_difference"] = whole
    sentences = findings(found)
    ending = ending.format(count=len(rows))
    assert sentences["lead"].endswith(ending)
    assert all(said.endswith(ending) for said in sentences["worth"] if "(95 %" in said)
    (parts,) = [said for said in sentences["worth"] if said.startswith("The parts")]
    assert parts.count(ending.removesuffix(".")) == parts.count("without")


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium")
def test_a_browser_shows_the_page_without_a_complaint(report, tmp_path):
    flags = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
        "--disable-background-networking --disable-component-update --enable-logging=stderr "
        f"--user-data-dir={tmp_path} --window-size=400,900 --dump-dom"
    )
    page = (report / "gates.html").as_uri()
    done = subprocess.run(
        [CHROMIUM, *flags.split(), page], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in done.stderr
    assert Page(done.stdout).ids == SECTIONS
    assert len(re.findall("<svg", done.stdout)) > 8


@pytest.fixture(scope="session")
def ungated(tiny_model, toy_files, tmp_path_factory) -> Path:
    """A run of LoRA without gates; read only."""
    from pelt_kernels.cli import main

    output = tmp_path_factory.mktemp("ungated") / "run"
    arguments = ["train", *options(tiny_model, toy_files), "--method", "lora", "--output", output]
    assert main([str(argument) for argument in arguments]) == 0
    return output


def test_a_run_without_gates_is_compared_with(trained, ungated, toy_files, tmp_path, run):
    assert run("gates", trained, "--ungated", ungated, "--output", tmp_path).code == 0
    (row,) = (
        r for r in numbers(tmp_path)["ablation"]["rows"] if r["change"] == "trained without gates"
    )
    metrics = json.loads((ungated / "metrics.json").read_text())
    assert row["score"] == pytest.approx(metrics["accuracy"])


def refused(outcome: Outcome, code: int, words: str) -> None:
    assert words in outcome.refused(code)


def test_what_has_no_gates_or_no_rows_is_refused(trained, ungated, tmp_path, run, toy_files):
    refused(run("gates", tmp_path / "none"), 2, "there is no folder")
    refused(run("gates", tmp_path), 2, "holds neither run.json nor task.json")
    refused(run("gates", ungated), 2, "expected an adapter with gates")
    refused(run("gates", trained / "adapter"), 2, "name a file with labelled rows as --task")
    bare = tmp_path / "bare.tsv"
    bare.write_text("text\n" + "good film\n" * 20)
    refused(run("gates", trained, "--task", bare), 2, "there is no column 'label'")
    few = write_tsv(tmp_path / "few.tsv", rows(3, seed=0))
    refused(run("gates", trained, "--task", few), 2, "expected at least 8 labelled rows, got 3")
    other = write_tsv(tmp_path / "other.tsv", [("good film", "7")] * 9)
    refused(run("gates", trained, "--task", other), 2, "label '7' is not one of 0, 1")
    assert not list(tmp_path.glob("gates.*"))


def test_a_damaged_or_unfinished_run_is_refused(trained, tmp_path, run):
    copy = tmp_path / "run"
    shutil.copytree(trained, copy)
    (result,) = copy.glob("lr-*/result.json")
    damage_json(result, "history", "[1]")
    refused(run("gates", copy), 1, "is damaged")
    result.write_text("{")
    refused(run("gates", copy), 1, "is damaged")
    (copy / "metrics.json").unlink()
    refused(run("gates", copy), 2, "is not finished")
    (copy / "adapter" / "task.json").unlink()
    refused(run("gates", copy), 2, "is not finished")
