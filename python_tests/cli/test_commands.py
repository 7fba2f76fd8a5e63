"""The commands from end to end on a tiny encoder."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from command import Run, options

from pelt_kernels.ops import BACKENDS, OPERATORS
from pelt_kernels.ops import _native as native
from pelt_kernels.training import load_task

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def test_train_tells_figures_and_leaves_everything(
    run: Run, tiny_model: Path, toy_files: tuple[Path, Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    done = run("train", *options(tiny_model, toy_files), "--output", output, "--seeds", "0,3")
    assert done.code == 0, done.err
    found = json.loads((output / "metrics.json").read_text())
    assert f"{found['accuracy']:.3f} ± {found['summary']['accuracy']['std']:.3f}" in done.out
    for counted in ("trainable_parameters", "stored_parameters"):
        assert f"{found[counted]:,}" in done.out
    for operator, backend in found["backends"].items():
        assert operator in done.out and backend in done.out
    assert [run["seed"] for run in found["seeds"]] == [0, 3]
    assert "early stopping" in done.err and "read once at the end" in done.err
    assert done.err.count("dev accuracy") == 2  # two seeds; one evaluation ends so few steps
    names = {path.name for path in output.iterdir()}
    assert {"metrics.json", "adapter", "curves.png", "gates.png", "run.json"} <= names


def test_nothing_reaches_for_a_network(
    run: Run, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert run("predict", "--adapter", trained / "adapter", "a good film").code == 0


def test_a_second_run_goes_elsewhere_and_an_explicit_folder_is_kept(
    run: Run,
    tiny_model: Path,
    toy_files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["train", *options(tiny_model, toy_files), "--method", "head", "--epochs", 1]
    for _ in range(2):
        assert run(*arguments).code == 0
    assert {path.name for path in Path("runs").iterdir()} == {"train-head", "train-head-2"}
    again = run(*arguments, "--output", "runs/train-head")
    assert "holds a run already" in again.refused(2)
    (tmp_path / "runs" / "train-head" / "notes.txt").write_text("mine")
    assert run(*arguments, "--output", "runs/train-head", "--overwrite", "--seeds", 5).code == 0
    found = json.loads(Path("runs/train-head/metrics.json").read_text())
    assert [run["seed"] for run in found["seeds"]] == [5]
    assert Path("runs/train-head/notes.txt").read_text() == "mine"


def test_resume_of_a_finished_run_repeats_its_figures(run: Run, trained: Path) -> None:
    before = (trained / "metrics.json").read_text()
    done = run("train", "--resume", "--output", trained)
    assert done.code == 0 and "dev accuracy" not in done.err
    assert (trained / "metrics.json").read_text() == before


def test_predict_in_all_its_forms_agrees(
    run: Run, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["a good film", "this book is awful", "", "so so warm"]
    adapter = ["--adapter", trained / "adapter"]
    asked = run("predict", *adapter, "--json", *texts)
    rows = [json.loads(line) for line in asked.out.splitlines()]
    assert [row["text"] for row in rows] == texts
    for row in rows:
        assert row["probability"] == max(row["probabilities"].values())
        assert set(row["probabilities"]) == {"0", "1"}
    assert "1 texts are empty" in asked.err
    lines = tmp_path / "texts.txt"
    lines.write_text("\n".join(texts) + "\n")
    table = tmp_path / "texts.tsv"
    table.write_text("text\n" + "\n".join(text or " " for text in texts) + "\n")
    assert run("predict", *adapter, "--json", "--file", lines).out == asked.out
    from_table = run("predict", *adapter, "--json", "--file", table).out.splitlines()
    assert [json.loads(line)["label"] for line in from_table] == [row["label"] for row in rows]
    monkeypatch.setattr("sys.stdin", io.StringIO(lines.read_text()))
    assert run("predict", *adapter, "--json").out == asked.out
    plain = run("predict", *adapter, *texts).out.splitlines()
    assert [line.split("\t")[0] for line in plain] == [row["label"] for row in rows]


def test_predict_tells_the_accuracy_of_labelled_rows(
    run: Run, trained: Path, toy_files: tuple[Path, Path]
) -> None:
    done = run("predict", "--adapter", trained / "adapter", "--file", toy_files[1])
    accuracy = json.loads((trained / "metrics.json").read_text())["accuracy"]
    assert f"accuracy {accuracy:.4f} on 60 labelled texts" in done.err


UNLABELLED = {
    "empty.csv": "text,label\na good film,\nbad,\n",
    "minus.tsv": "sentence\tidx\tlabel\na good film\t0\t-1\nbad\t1\t-1\n",
    "null.jsonl": '{"text": "a good film", "label": null}\n{"text": "bad", "label": NaN}\n',
    "gone.jsonl": '{"text": "a good film"}\n{"text": "bad", "id": 1}\n',
}


@pytest.mark.parametrize("name", UNLABELLED)
def test_rows_without_a_label_are_labelled(
    run: Run, trained: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text(UNLABELLED[name])
    adapter = ["--adapter", trained / "adapter"]
    done = run("predict", *adapter, "--file", tmp_path / name)
    assert done.code == 0 and done.out == run("predict", *adapter, "a good film", "bad").out
    assert "accuracy" not in done.err
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text('{"text": "a good film"}\n{"text": "bad", "label": 1}\n')
    assert "on 1 labelled texts; 1 are without" in run("predict", *adapter, "--file", mixed).err


def test_an_argument_that_is_no_text_is_read_with_a_note(run: Run, trained: Path) -> None:
    adapter = ["--adapter", trained / "adapter", "--json"]
    done = run("predict", *adapter, "a good film", "good \udcff")  # the byte 0xff as Python has it
    assert done.code == 0 and json.loads(done.out.splitlines()[1])["text"] == "good \ufffd"
    assert "argument 2: what is no character" in done.err


def test_columns_by_their_places_are_kept_and_resumed(
    run: Run, tiny_model: Path, tmp_path: Path
) -> None:
    table = tmp_path / "a.tsv"
    table.write_text("".join(f"id{n}\t{n % 2}\tgood film {n}\n" for n in range(60)))
    names = ["--no-header", "--text-column", 3, "--label-column", 2]
    small = ["--model", tiny_model, "--method", "head", "--epochs", 1, "--device", "cpu"]
    output = tmp_path / "out"
    done = run("train", "--task", table, *names, *small, "--output", output)
    assert done.code == 0, done.err
    assert run("train", "--resume", "--output", output).out == done.out
    told = run("predict", "--adapter", output / "adapter", "--file", table, *names).err
    assert "on 60 labelled texts" in told


def test_an_over_long_text_is_cut_with_one_note(run: Run, trained: Path) -> None:
    long = "good film " * 300
    done = run("predict", "--adapter", trained / "adapter", long, "--json")
    cut = run("predict", "--adapter", trained / "adapter", "good film " * 7, "--json")
    assert done.code == 0 and done.err.count("cut") == 1
    assert json.loads(done.out)["label"] == json.loads(cut.out)["label"]
    assert json.loads(done.out)["probability"] == pytest.approx(json.loads(cut.out)["probability"])


def test_pairs_are_read_from_tabs_options_and_files(
    run: Run, tiny_model: Path, tmp_path: Path
) -> None:
    table = tmp_path / "pairs.tsv"
    rows = [f"good film {n % 7}\tbad book\t{n % 2}" for n in range(60)]
    table.write_text("sentence1\tsentence2\tlabel\n" + "\n".join(rows) + "\n")
    output = tmp_path / "out"
    short = ["--model", tiny_model, "--method", "head", "--epochs", 1, "--device", "cpu"]
    assert run("train", "--task", table, *short, "--output", output).code == 0
    adapter = ["--adapter", output / "adapter", "--json"]
    by_tab = run("predict", *adapter, "good film\tbad book")
    by_option = run("predict", *adapter, "good film", "--pair", "bad book")
    assert by_tab.code == 0 and by_tab.out == by_option.out
    assert json.loads(by_tab.out)["text_pair"] == "bad book"
    reply = run("predict", *adapter, "no second text").refused(2)
    assert "argument 1: the adapter reads two texts" in reply
    assert "expected one --pair for each" in run(
        "predict", *adapter, "a", "b", "--pair", "c"
    ).refused(2)


def test_info_names_versions_backends_and_the_adapter(run: Run, trained: Path) -> None:
    done = run("info", "--adapter", trained / "adapter")
    assert done.code == 0, done.err
    for word in ("torch", "prefix_attention", "eager", "yes", "cuda kernels for", "lora.r"):
        assert word in done.out
    assert all(isa in done.out for isa in native.instruction_sets())
    assert "unipelt" in done.out and "BertForSequenceClassification" in done.out


def test_info_as_json_has_each_backend_of_each_operator(run: Run, trained: Path) -> None:
    found = json.loads(run("info", "--json", "--adapter", trained / "adapter").out)
    assert set(found["backends"]) == set(OPERATORS)
    for answers in found["backends"].values():
        assert list(answers) == list(BACKENDS) and answers["eager"] == "yes"
        assert all(answer.startswith(("yes", "no: ")) for answer in answers.values())
    assert found["adapter"]["lora"]["r"] == 8 and "torch" in found["machine"]


def test_a_command_that_trains_nothing_loads_no_trainer() -> None:
    heavy = {"accelerate", "matplotlib", "scipy", "sklearn", "transformers.trainer"}
    code = (
        "import sys; from pelt_kernels.cli import main; main(['methods']);"
        f"sys.exit(', '.join({heavy} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "unipelt" in done.stdout, done.stderr


def test_fields_of_a_method_are_set_kept_and_resumed(
    run: Run, tiny_model: Path, toy_files: tuple[Path, Path], tmp_path: Path
) -> None:
    fields = ["adapter.placement=parallel", "adapter.bottleneck=4", "lora.r=2", "bitfit=true"]
    words = [word for field in fields for word in ("--set", field)]
    arguments = ["--method", "composite", "--output", tmp_path / "out", *words]
    done = run("train", *options(tiny_model, toy_files), *arguments)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "out" / "run.json").read_text())["options"] == fields
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["method_config"]
    saved = json.loads((tmp_path / "out" / "adapter" / "pelt_config.json").read_text())
    assert saved["config"] == found
    assert (found["adapter"]["bottleneck"], found["lora"]["r"], found["prefix"]) == (4, 2, None)
    for again in ([], words, ["--set", "lora.r=02", "--set", "lora.alpha=16"]):
        resumed = run("train", "--resume", "--output", tmp_path / "out", *again)
        assert resumed.code == 0 and resumed.out == done.out, resumed.err
    predicted = run("predict", "--adapter", tmp_path / "out" / "adapter", "a good film")
    assert predicted.code == 0, predicted.err


def test_sst2_as_a_newcomer_types_it(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    folder = DATA / "sst2"
    if not folder.is_dir():
        pytest.skip(f"the data of SST-2 is not in {DATA}")
    files = ["--task", folder / "train.tsv", "--eval", folder / "dev.tsv"]
    small = ["--model", tiny_model, "--epochs", 1, "--train-examples", 64]
    done = run("train", *files, *small, "--output", tmp_path / "out")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["task"]["examples"] == {"train": 64, "dev": 500, "test": 872}
    assert found["task"]["fingerprint"] == load_task(*map(str, files[1::2])).fingerprint
