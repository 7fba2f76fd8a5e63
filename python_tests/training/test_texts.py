"""Sources and targets as token ids, what a model reads of them when it writes, and their scores."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_writers import pair_files, pairs, save_writer, write_pairs, writers

from pelt_kernels.training import Example, RunError, TrainConfig, UsageError, load_task, train
from pelt_kernels.training.base_model import load_tokenizer, load_writer, load_writing_tokenizer
from pelt_kernels.training.conditioned import conditioned
from pelt_kernels.training.encode import Form, condition_tensors
from pelt_kernels.training.lengths import with_lengths
from pelt_kernels.training.tasks import Columns, Conditions
from pelt_kernels.training.text_metrics import text_scores
from pelt_kernels.training.texts import NO_LOSS, TextPad, TextWriter, encode_texts

__all__ = ["pair_files", "writers"]


def example(source: str, target: str = "le chat", **more: Any) -> Example:
    return Example(source, None, target, "here", **more)


def form_of(writers: dict[str, Path], family: str, **more: Any) -> Form:
    tokenizer = load_writing_tokenizer(str(writers[family]))
    return Form(tokenizer, 8, max_target_length=6, is_causal=family == "gpt2", **more)


def test_a_decoder_alone_has_its_loss_on_the_target_and_its_end(writers: dict[str, Path]) -> None:
    form = form_of(writers, "gpt2")
    ids = form.tokenizer.convert_tokens_to_ids
    encoded = encode_texts([example("the red cat"), example("a dog", "le chien est noir")], form)
    source, target = ids(["the", "red", "cat", "</s>"]), ids(["le", "chat", "</s>"])
    assert encoded.rows[0]["input_ids"] == source + target
    assert encoded.rows[0]["labels"] == [NO_LOSS] * 4 + target
    batch = TextPad(form)(encoded.rows)
    assert batch["labels"][0].tolist() == [NO_LOSS] * 4 + target + [NO_LOSS]
    assert batch["attention_mask"].tolist() == [[1] * 7 + [0], [1] * 8]
    model = load_writer(str(writers["gpt2"])).eval()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logs = logits.log_softmax(-1)
    expected = [-logs[0, place, word] for place, word in zip((3, 4, 5), target)]
    expected += [-logs[1, 2 + n, word] for n, word in enumerate(encoded.rows[1]["labels"][3:])]
    assert model(**batch).loss.item() == pytest.approx(
        torch.stack(expected).mean().item(), abs=1e-5
    )


def test_an_encoder_reads_the_source_and_its_decoder_the_target(writers: dict[str, Path]) -> None:
    form = form_of(writers, "t5")
    ids = form.tokenizer.convert_tokens_to_ids
    encoded = encode_texts([example("the red cat"), example("a dog", "le chien est noir")], form)
    assert encoded.rows[0]["input_ids"] == ids(["the", "red", "cat", "</s>"])
    assert encoded.rows[0]["labels"] == ids(["le", "chat", "</s>"])
    batch = TextPad(form)(encoded.rows)
    assert batch["labels"][0].tolist()[-2:] == [NO_LOSS] * 2
    assert load_writer(str(writers["t5"]))(**batch).loss.isfinite()


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_long_texts_are_cut_and_counted(writers: dict[str, Path], family: str) -> None:
    form = form_of(writers, family)
    long = example("the red cat is here is here is here", "le chat est rouge est rouge est")
    encoded = encode_texts([example("the cat"), long], form)
    assert (encoded.truncated, encoded.cut_targets) == (1, 1)
    end = form.tokenizer.eos_token_id
    row = encoded.rows[1]
    assert row["labels"][-1] == end and sum(label != NO_LOSS for label in row["labels"]) == 6
    source = row["input_ids"] if family == "t5" else row["input_ids"][:9]
    assert source[-1] == end and len(source) == 8 + (family == "gpt2")


@pytest.mark.parametrize("family", ["gpt2", "t5"])
@pytest.mark.parametrize("beams", [1, 3])
def test_what_is_written_depends_on_no_neighbour(
    writers: dict[str, Path], family: str, beams: int
) -> None:
    model = load_writer(str(writers[family])).eval()
    writer = TextWriter(model, form_of(writers, family), beams, max_new_tokens=5)
    examples = [example(source) for source, _, _ in pairs(9, seed=5)]
    done: list[int] = []
    together, _ = writer([*examples, examples[0]], 4, done.append)
    assert sum(done) == 10 and together[0] == together[-1]
    assert together[:-1] == [writer([one])[0][0] for one in examples]
    assert len(set(together)) > 1


def test_equal_rows_are_written_once_and_conditions_are_passed(writers: dict[str, Path]) -> None:
    conditions = Conditions((("mood", ("calm", "loud")), ("size", ("s",))), ("a", "b"))
    calls: list[dict[str, Any]] = []

    class Model(torch.nn.Linear):
        def generate(self, input_ids: torch.Tensor, **inputs: Any) -> torch.Tensor:
            calls.append(inputs)
            return input_ids

    writer = TextWriter(Model(1, 1), form_of(writers, "t5", conditions=conditions), 2, 7)
    size = ("size", "s")
    examples = [
        example("the cat", attributes=(("mood", "calm"), size), task="b"),
        example("the cat", attributes=(("mood", "loud"), size), task="a"),
        example("the cat", "another target", attributes=(("mood", "calm"), size), task="b"),
    ]
    assert writer(examples)[0] == ["the cat"] * 3
    (call,) = calls
    assert {name: list(value) for name, value in call["attributes"].items()} == {
        "mood": [0, 1], "size": [0, 0],
    }  # fmt: skip
    assert call["tasks"].tolist() == [1, 0] and call["tasks"].dtype == torch.int64
    assert call["num_beams"] == 2 and call["max_new_tokens"] == 7


def test_conditions_are_tensors_in_a_batch_only_where_there_are_any() -> None:
    assert condition_tensors([{"input_ids": [1]}]) == {}
    made = condition_tensors([{"tasks": 1}, {"tasks": 0}])
    assert list(made) == ["tasks"] and made["tasks"].tolist() == [1, 0]


def test_scores_of_texts_are_the_known_ones() -> None:
    same = text_scores(["the cat sat here"], [["the cat sat here"]])
    assert same == pytest.approx({"bleu": 100, "chrf": 100, "rouge_l": 100})
    # Four words of five in order, precisions 4/5, 3/4, 2/3, 1/2 and no penalty: the fourth root of
    # 1/5. ROUGE-L: 4 words of 5 on both sides.
    found = text_scores(["a b c d x"], [["a b c d y"]])
    assert found["bleu"] == pytest.approx(100 * 0.2**0.25)
    assert found["rouge_l"] == pytest.approx(80)
    # A text's further reference counts; the other has one only.
    texts, references = ["a b c d", "e f g h"], [["x", "a b c d"], ["e f g h"]]
    assert text_scores(texts, references) == pytest.approx(same)
    assert text_scores(["", "e f g h"], references)["rouge_l"] == pytest.approx(50)


def test_a_missing_package_is_one_sentence(
    writers: dict[str, Path], pair_files: tuple[Path, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name in ("sacrebleu", "sacrebleu.metrics"):
        monkeypatch.setitem(sys.modules, name, None)
    config = TrainConfig(task=str(pair_files[0]), model=str(writers["t5"]), method="full")
    with pytest.raises(
        UsageError, match="sacrebleu.* is not installed; pip install 'pelt-kernels.gen"
    ):
        train(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_source_and_target_columns_show_that_texts_are_written(
    pair_files: tuple[Path, Path], tmp_path: Path
) -> None:
    task = load_task(str(pair_files[0]), str(pair_files[1]))
    assert task.problem == "generation" and task.labels == () and not task.conditions
    assert task.test[0].text == pairs(1, seed=2)[0][0]
    assert task.test[0].label == pairs(1, seed=2)[0][1]
    other = write_pairs(tmp_path / "a.tsv", pairs(60, seed=3))
    other.write_text(other.read_text().replace("source\ttarget", "from\tto"))
    columns = Columns(text="from", label="to", problem="generation")
    assert load_task(str(other), columns=columns).problem == "generation"
    with pytest.raises(
        UsageError, match="no column 'target' among from, to, mood; name it with --tar"
    ):
        load_task(str(other), columns=Columns(text="from", problem="generation"))
    gap = write_pairs(tmp_path / "b.tsv", [*pairs(60, seed=3), ("the cat", " ", "calm")])
    with pytest.raises(UsageError, match="line 62 of .*the target is empty"):
        load_task(str(gap))


def test_few_sources_are_held_out_where_they_have_many_targets(tmp_path: Path) -> None:
    table = [(f"the cat {n % 40}", f"le chat {n}", "calm") for n in range(400)]
    task = load_task(str(write_pairs(tmp_path / "a.tsv", table)))
    sources = [{example.text for example in part} for part in (task.train, task.dev, task.test)]
    assert [len(part) for part in sources] == [32, 4, 4]
    assert len(task.train) == 320 and len(task.dev) == 36 and len(task.test) == 40


def test_attributes_and_tasks_have_labels(pair_files: tuple[Path, Path], tmp_path: Path) -> None:
    columns = Columns(attributes=(("mood", "mood"),), task="mood")
    task = load_task(str(pair_files[0]), str(pair_files[1]), columns)
    assert task.conditions == Conditions((("mood", ("calm", "loud")),), ("calm", "loud"))
    plain = load_task(str(pair_files[0]), str(pair_files[1]))
    assert plain.fingerprint != task.fingerprint
    test = write_pairs(tmp_path / "test.tsv", [*pairs(9, seed=3), ("the cat", "le chat", "angry")])
    sentence = "line 11 of .*attribute mood 'angry' is not one of calm, loud"
    with pytest.raises(UsageError, match=sentence):
        load_task(str(pair_files[0]), str(test), Columns(attributes=(("mood", "mood"),)))
    with pytest.raises(
        UsageError, match="there is no column 'tone'; its columns are source, target"
    ):
        load_task(str(pair_files[0]), columns=Columns(attributes=(("mood", "tone"),)))
    gap = write_pairs(tmp_path / "gap.tsv", [*pairs(60, seed=3), ("the cat", "le chat", "")])
    with pytest.raises(UsageError, match="line 62 of .*'mood' is empty"):
        load_task(str(gap), columns=Columns(task="mood"))


def test_several_files_are_tasks_by_their_names(tmp_path: Path) -> None:
    files = [
        write_pairs(tmp_path / f"{name}.tsv", pairs(60, seed=n)) for n, name in enumerate("ba")
    ]
    test = str(write_pairs(tmp_path / "test.tsv", pairs(9, seed=7)))
    task = load_task(str(files[0]), test, more=[(str(files[1]), test)])
    assert task.conditions.tasks == ("a", "b") and task.name == "b+a"
    assert [e.task for e in task.test] == ["b"] * 9 + ["a"] * 9
    assert {e.task for e in task.dev} == {"a", "b"}
    with pytest.raises(UsageError, match="eval: expected a test file for each --task"):
        load_task(str(files[0]), test, more=[(str(files[1]), None)])
    with pytest.raises(UsageError, match="task: expected files of different names"):
        load_task(str(files[0]), more=[(str(files[0]), None)])


def lengths_of(model: Path, files: tuple[Path, Path], **options: Any) -> tuple[Any, Any]:
    task = load_task(*map(str, files))
    config = TrainConfig(model=str(model), **options)
    found = with_lengths(config, load_writing_tokenizer(str(model)), task)
    return found.max_length, found.max_target_length


def test_a_target_has_room_or_is_refused(
    writers: dict[str, Path], pair_files: tuple[Path, Path], tmp_path: Path
) -> None:
    assert lengths_of(writers["gpt2"], pair_files) == (64 - 6 - 1, 6)
    assert lengths_of(writers["t5"], pair_files, max_length=9) == (9, 6)
    assert lengths_of(writers["gpt2"], pair_files, max_target_length=50) == (64 - 51, 50)
    wrong: Sequence[tuple[dict[str, int], str]] = (
        ({"max_target_length": 63}, "max-target-length: .* writes at most 62 tokens, not 63"),
        ({"max_length": 58}, "max-length: .* reads at most 57 tokens beside a target of 6 and an"),
        ({"max_length": 0}, "max-length: expected at least 1, got 0"),
    )
    for options, sentence in wrong:
        with pytest.raises(UsageError, match=sentence):
            lengths_of(writers["gpt2"], pair_files, **options)
    long = [*pairs(60, seed=3), ("the cat", "le " * 70, "calm")] * 2
    file = write_pairs(tmp_path / "a.tsv", long)
    with pytest.raises(
        UsageError, match="line 62 of .*has 71 tokens with its end, and .*at most 62"
    ):
        lengths_of(writers["gpt2"], (file, pair_files[1]))


@pytest.mark.parametrize("family", ["bart", "llama"])
def test_other_families_write_too(tmp_path: Path, family: str) -> None:
    folder = str(save_writer(tmp_path / family, family))
    form = Form(load_writing_tokenizer(folder), 8, max_target_length=6, is_causal=family == "llama")
    model = load_writer(folder).eval()
    assert model(**TextPad(form)(encode_texts([example("the cat")], form).rows)).loss.isfinite()
    assert len(TextWriter(model, form, 2, 4)([example("the cat"), example("a dog")])[0]) == 2


def test_models_that_do_not_write_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a sequence-to-sequence or a causal .*, a bert"):
        load_writer(str(tiny_model))
    with pytest.raises(UsageError, match="has no end of a text"):
        load_writing_tokenizer(str(tiny_model))
    bare = save_writer(tmp_path / "bare", "t5")
    load_writer(str(bare)).encoder.save_pretrained(bare)
    with pytest.raises((UsageError, RunError), match="weights lack|cannot be loaded"):
        load_writer(str(bare))


def test_a_decoder_without_padding_pads_with_its_end(writers: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="no padding token"):
        load_tokenizer(str(writers["gpt2"]))
    assert load_writing_tokenizer(str(writers["gpt2"])).pad_token == "</s>"
    assert load_writing_tokenizer(str(writers["t5"])).pad_token == "<pad>"


def test_a_method_gets_the_attributes_and_tasks_of_the_data() -> None:
    from pelt_kernels.methods import LoraConfig
    from pelt_kernels.methods.control_prefixes import ControlPrefixesConfig
    from pelt_kernels.methods.vlm import VLMConfig

    moods = Conditions((("mood", ("calm", "loud")),))
    tasks = Conditions((), ("a", "b"))
    assert conditioned(LoraConfig(), Conditions()) == LoraConfig()
    assert dict(conditioned(ControlPrefixesConfig(), moods).attributes) == {"mood": 2}  # type: ignore[attr-defined]
    assert conditioned(VLMConfig(), tasks).tasks == ("a", "b")  # type: ignore[attr-defined]
    more = ControlPrefixesConfig(attributes={"mood": 3}, unseen={"mood": 1})
    assert conditioned(more, moods) == more
    for config, conditions, sentence in (
        (LoraConfig(), moods, "expected a method that reads attributes, such as control_prefixes"),
        (LoraConfig(), tasks, "expected a method that reads tasks, such as vlm"),
        (ControlPrefixesConfig(attributes={"mood": 1}), moods, "as the data has them"),
        (VLMConfig(tasks=("b", "a")), tasks, "as the data has them, .*got .'b', 'a'"),
    ):
        with pytest.raises(UsageError, match=sentence):
            conditioned(config, conditions)
