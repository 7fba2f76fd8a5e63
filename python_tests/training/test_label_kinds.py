"""Scores and several labels a row: how they are told from classes, learned, judged and predicted."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny_encoder import BAD, GOOD, OTHER, damage_json, write_csv, write_tsv

from pelt_kernels.cli import main
from pelt_kernels.training import (
    Example,
    Predictor,
    RunError,
    TrainConfig,
    UsageError,
    load_task,
    train,
)
from pelt_kernels.training.metrics import correlations, set_scores
from pelt_kernels.training.predictor import Card
from pelt_kernels.training.problems import PROBLEMS
from pelt_kernels.training.tasks import PROBLEMS as NAMES
from pelt_kernels.training.tasks import Columns


def scored(count: int, seed: int) -> list[tuple[str, str]]:
    """(text, score): good words minus bad ones, in halves."""
    draw = random.Random(seed)
    table = []
    for _ in range(count):
        words = draw.choices(OTHER + GOOD + BAD, k=draw.randrange(3, 12))
        score = sum(word in GOOD for word in words) - sum(word in BAD for word in words)
        table.append((" ".join(words), f"{score / 2:.2f}"))
    return table


def tagged(count: int, seed: int) -> list[tuple[str, list[str]]]:
    """(text, labels): "praise" with a good word, "blame" with a bad one, both or neither."""
    draw = random.Random(seed)
    table = []
    for _ in range(count):
        words = (
            draw.choices(OTHER, k=5)
            + draw.choices([*[""] * 5, *GOOD], k=1)
            + draw.choices([*[""] * 5, *BAD], k=1)
        )
        labels = ["praise"] * any(word in GOOD for word in words)
        labels += ["blame"] * any(word in BAD for word in words)
        draw.shuffle(words)
        table.append((" ".join(filter(None, words)), labels))
    return table


def write_lines(path: Path, table: list[tuple[str, list[str]]]) -> Path:
    lines = (json.dumps({"text": text, "labels": labels}) for text, labels in table)
    path.write_text("".join(line + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def score_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tsv(tmp_path_factory.mktemp("scores") / "scores.tsv", scored(300, seed=1))


@pytest.fixture(scope="module")
def label_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("labels") / "labels.jsonl", tagged(300, seed=1))


def learned(file: Path, model: Path, output: Path, **options: object) -> dict[str, object]:
    base = {"method": "full", "lr": (3e-3,), "epochs": 8, "batch_size": 16, "max_length": 16}
    config = {"task": str(file), "model": str(model), "device": "cpu", **base, **options}
    return train(TrainConfig(**config), output)  # type: ignore[arg-type]


def test_a_problem_has_one_name_in_data_and_in_training() -> None:
    assert set(PROBLEMS) == set(NAMES)


def test_fractions_are_scores_and_this_is_said(score_file: Path) -> None:
    said: list[str] = []
    task = load_task(str(score_file), say=said.append)
    assert task.problem == "regression" and task.labels == ()
    assert len(said) == 1 and "learned as scores (--problem regression)" in said[0]
    as_classes = load_task(
        str(score_file), columns=Columns(problem="classification"), say=said.append
    )
    assert as_classes.problem == "classification" and "0.50" in as_classes.labels


@pytest.mark.parametrize(("form", "of"), [("{:d}", 21), ("{:.1e}", 30), ("{:d}.0", 25)])
def test_many_numbers_are_what_the_option_says(tmp_path: Path, form: str, of: int) -> None:
    convert: Callable[[int], float] = float if "e" in form else int
    table = [(f"text {n}", form.format(convert(n % of))) for n in range(10 * of)]
    path = str(write_tsv(tmp_path / "a.tsv", table))
    with pytest.raises(UsageError, match=f"got {of} different numbers .*--problem") as error:
        load_task(path)
    assert "\n" not in str(error.value)
    assert len(load_task(path, columns=Columns(problem="classification")).labels) == of
    assert load_task(path, columns=Columns(problem="regression")).labels == ()


def test_numbers_that_are_no_scores_are_refused(tmp_path: Path) -> None:
    words = write_tsv(tmp_path / "a.tsv", [*[(f"x{n}", f"0.{n}") for n in range(90)], ("y", "?")])
    with pytest.raises(
        UsageError, match="90 different numbers such as 0.9 beside '[?]', which may"
    ):
        load_task(str(words))
    one = write_tsv(tmp_path / "b.tsv", [(f"x{n}", "0.5") for n in range(20)])
    with pytest.raises(UsageError, match="b.tsv: expected at least two different scores, got only"):
        load_task(str(one))


def test_a_score_that_is_no_number_is_refused_by_its_line(tmp_path: Path) -> None:
    for wrong in ("high", "nan", "inf"):
        path = write_tsv(tmp_path / "a.tsv", [*scored(20, seed=0), ("text", wrong)])
        with pytest.raises(UsageError, match=f"line 22 of .*a number as label, got '{wrong}'"):
            load_task(str(path), columns=Columns(problem="regression"))


def test_lists_are_several_labels_and_so_are_texts_where_told(tmp_path: Path) -> None:
    table = tagged(60, seed=2)
    lists = load_task(str(write_lines(tmp_path / "a.jsonl", table)))
    texts = [(text, " ;".join(labels)) for text, labels in table]
    columns = Columns(problem="multi-label")
    by_text = load_task(
        str(write_csv(tmp_path / "a.csv", texts, ("text", "label"))), None, columns, separator=";"
    )
    for task in (lists, by_text):
        assert task.problem == "multi-label" and task.labels == ("blame", "praise")
    for part in ("train", "dev", "test"):
        found = [(e.text, e.label) for e in getattr(by_text, part)]
        assert found == [(e.text, e.label) for e in getattr(lists, part)]
    assert () in {e.label for e in lists.train}, "a row may have no label"
    with pytest.raises(UsageError, match=r"line 1 of .*expected one label, got .*--problem multi"):
        load_task(
            str(write_lines(tmp_path / "b.jsonl", [("x", ["a", "b"])] * 20)),
            columns=Columns(problem="classification"),
        )


def test_a_rare_label_is_not_held_out_whole(tmp_path: Path) -> None:
    table = tagged(80, seed=3)
    for at in range(0, 80, 7):
        with_rare = [
            (f"{text} {n}", [*labels, "rare"] if n == at else labels)
            for n, (text, labels) in enumerate(table)
        ]
        task = load_task(str(write_lines(tmp_path / "a.jsonl", with_rare)))
        assert any("rare" in (example.label or ()) for example in task.train)


def test_an_unknown_label_of_the_test_part_is_refused(tmp_path: Path, label_file: Path) -> None:
    test = write_lines(tmp_path / "test.jsonl", [("x", ["praise"]), ("y", ["praise", "awe"])])
    with pytest.raises(UsageError, match="line 2 of .*label 'awe' is not one of blame, praise"):
        load_task(str(label_file), str(test))


def test_correlations_are_the_known_ones() -> None:
    predicted, expected = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 4.0, 9.0, 2.0])
    found = correlations(predicted, expected)
    # Ranks 1 2 3 4 and 1 3 4 2: 1 - 6 (0 + 1 + 1 + 4) / (4 * 15); products of deviations 4 over the
    # root of 5 * 38.
    assert found["spearman"] == pytest.approx(0.4)
    assert found["pearson"] == pytest.approx(4 / np.sqrt(5 * 38))
    assert correlations(-expected, expected) == {
        "spearman": pytest.approx(-1),
        "pearson": pytest.approx(-1),
    }
    assert set(correlations(np.ones(4), expected).values()) == {0.0}
    assert set(correlations(np.ones(1), np.ones(1)).values()) == {0.0}


def test_scores_of_sets_are_the_known_ones() -> None:
    expected = np.array([[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0]], dtype=bool)
    predicted = np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0]], dtype=bool)
    # Right 3, given 4, expected 4; by label 1, 0 and 0; two rows of four are right.
    assert set_scores(predicted, expected) == pytest.approx(
        {"f1_micro": 6 / 8, "f1_macro": 1 / 3, "accuracy": 2 / 4}
    )


def test_scores_are_learned_and_predicted(
    tiny_model: Path, score_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = learned(score_file, tiny_model, tmp_path / "out", epochs=12)
    assert found["spearman"] > 0.6 and found["pearson"] > 0.6  # type: ignore[operator]
    assert found["config"]["metric"] == "spearman" and found["task"]["problem"] == "regression"  # type: ignore[index]
    adapter = tmp_path / "out" / "adapter"
    tested = [json.loads(line) for line in (tmp_path / "out" / "test_predictions.jsonl").open()]
    answers = Predictor(adapter)([Example(row["text"], None, None, "") for row in tested]).rows
    assert [row["predicted"] for row in tested] == pytest.approx(
        [answer.score for answer in answers]
    )
    command = ["predict", "--adapter", str(adapter), "--file", str(score_file)]
    assert main(command) == 0
    out, err = capsys.readouterr()
    assert float(out.split("\t")[0]) == pytest.approx(float(scored(1, seed=1)[0][1]), abs=1.5)
    assert "Spearman 0." in err and "Pearson 0." in err and "on 300 labelled texts" in err
    assert main([*command, "--json"]) == 0
    assert {"text", "expected", "score"} == set(json.loads(capsys.readouterr()[0].splitlines()[0]))
    exported = ["export", "--adapter", str(adapter), "--output", str(tmp_path / "plain")]
    assert main(exported) == 0
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["problem_type"] == "regression" and len(config["id2label"]) == 1


def test_several_labels_are_learned_and_predicted(
    tiny_model: Path, label_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = learned(label_file, tiny_model, tmp_path / "out", epochs=12)
    assert found["f1_micro"] > 0.85 and found["accuracy"] > 0.7  # type: ignore[operator]
    adapter = str(tmp_path / "out" / "adapter")
    assert Card.load(Path(adapter)).problem == "multi-label"
    assert main(["predict", "--adapter", adapter, "--file", str(label_file), "--json"]) == 0
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert set(lines[0]) == {"text", "expected", "labels", "probabilities"}
    for row in lines:
        assert row["labels"] == [name for name, p in row["probabilities"].items() if p >= 0.5]
    given = [row["labels"] == sorted(row["expected"]) for row in lines]
    assert f"all labels right {sum(given) / 300:.4f} on 300 labelled texts" in err


@pytest.mark.parametrize("method", ["adamix", "pst", "unipelt", "head"])
def test_methods_learn_scores_and_sets(
    tiny_model: Path, score_file: Path, label_file: Path, tmp_path: Path, method: str
) -> None:
    for file, name in ((score_file, "spearman"), (label_file, "f1_micro")):
        found = learned(file, tiny_model, tmp_path / name, method=method, epochs=1)
        assert np.isfinite(found[name]), (file, found[name])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"metric": "f1"}, "metric: expected one of spearman, pearson, got 'f1'"),
        ({"class_weights": "balanced"}, "class-weights: expected none for a regression, got 'bal"),
        (
            {"problem": "ranking"},
            "problem: expected one of classification, regression, multi-label",
        ),
        ({"label_separator": " "}, "label-separator: expected a mark such as ',', got ' '"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    tiny_model: Path, score_file: Path, tmp_path: Path, options: dict[str, str], sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        learned(score_file, tiny_model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_card_from_before_there_were_problems_is_read(tmp_path: Path) -> None:
    Card("toy", "model", ("0", "1"), False, 16).save(tmp_path)
    values = json.loads((tmp_path / "task.json").read_text())
    del values["problem"], values["label_separator"]
    (tmp_path / "task.json").write_text(json.dumps(values))
    assert Card.load(tmp_path).problem == "classification"
    Card("toy", "model", ("0", "1"), False, 16).save(tmp_path)
    damage_json(tmp_path / "task.json", "problem", '"ranking"')
    with pytest.raises(RunError, match="expected problem as one of classification, .* 'ranking'"):
        Card.load(tmp_path)


def test_the_embedded_task_is_a_classification() -> None:
    with pytest.raises(UsageError, match="docstring-match is a classification, not a regression"):
        load_task("docstring-match", columns=Columns(problem="regression"))
