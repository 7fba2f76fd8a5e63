"""Adapters of tasks that were trained apart, joined into one model: each answers as it did."""

from __future__ import annotations

import pytest
import torch
from families import WORDS, make_writer
from test_writers import batch, randomised
from transformers import BertConfig, BertForSequenceClassification

from pelt_kernels import LoraConfig, get_pelt_model
from pelt_kernels.cli import main
from pelt_kernels.methods import VLMConfig
from pelt_kernels.models import PeltModel
from pelt_kernels.models.join import join_adapters


def base(words: int = 3):
    """A GPT-2 with words for all tasks, the same at each call."""
    model = make_writer("gpt2")
    torch.manual_seed(5)
    model.resize_token_embeddings(WORDS + words, mean_resizing=False)
    return model


def saved(folder, tasks, bottlenecks, words=(), seed=0):
    """An adapter of some tasks in a folder; its logits by task."""
    config = VLMConfig(tasks=tasks, bottlenecks=bottlenecks, trainable_tokens=words)
    model = get_pelt_model(base(), config)
    randomised(model)
    with torch.no_grad():
        for parameter in model.trained_parameters().values():
            parameter.mul_(1 + seed)
        for bank in model.task_adapters:  # as training leaves it: zero beyond a task's bottleneck
            for task, size in enumerate(config.bottleneck_of_each()):
                bank.w_down[task, size:] = 0
                bank.b_down[task, size:] = 0
                bank.w_up[task, :, size:] = 0
    model.eval().save_pretrained(folder)
    ids = [word % (WORDS + 3) for word in words]
    return {task: logits(model, task, ids) for task in tasks}


def logits(model, task, words):
    """Of texts in which the task's own words stand; other words' logits are not its own."""
    inputs = batch("gpt2")
    inputs["input_ids"][:, 0] = words[0] if words else 7
    with torch.no_grad():
        return model(**inputs, tasks=task).logits[..., :WORDS]


def test_each_task_answers_as_before(tmp_path):
    words = {"mt": (WORDS,), "qa": (WORDS + 1,), "sum": (WORDS + 1,), "dialogue": ()}
    expected = saved(tmp_path / "a", ("mt",), (4,), words["mt"])
    expected |= saved(tmp_path / "b", ("qa", "sum"), (2, 6), (-2,), seed=1)
    expected |= saved(tmp_path / "c", ("dialogue",), (3,), seed=2)
    folders = [tmp_path / name for name in "abc"]
    config = join_adapters(folders, tmp_path / "all")
    assert config.tasks == tuple(words) and config.bottlenecks == (4, 2, 6, 3)
    assert config.trainable_tokens == (WORDS, WORDS + 1)
    model = PeltModel.from_pretrained(base(), tmp_path / "all")
    for task, own in words.items():
        found = logits(model, task, own)
        torch.testing.assert_close(found, expected[task], rtol=1e-5, atol=1e-5)


def test_the_command(tmp_path, capsys):
    saved(tmp_path / "a", ("mt",), (4,))
    saved(tmp_path / "b", ("qa",), (2,))
    words = ["join", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "all")]
    assert main(words) == 0
    assert "mt (4), qa (2)" in capsys.readouterr().out
    assert main(words) == 2
    assert "expected a new directory" in capsys.readouterr().err


def test_what_cannot_be_joined_gets_a_sentence(tmp_path):
    saved(tmp_path / "a", ("mt",), (4,), (WORDS,))
    saved(tmp_path / "same-task", ("mt",), (4,))
    saved(tmp_path / "same-word", ("qa",), (4,), (WORDS,), seed=1)
    get_pelt_model(base(), LoraConfig(r=2)).save_pretrained(tmp_path / "lora")
    other = get_pelt_model(base(words=2), VLMConfig(tasks=("qa",), bottlenecks=(4,)))
    other.save_pretrained(tmp_path / "other-words")
    config = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    classifier = get_pelt_model(BertForSequenceClassification(config), VLMConfig(tasks=("x",)))
    classifier.save_pretrained(tmp_path / "head")
    for name, sentence in {
        "same-task": "different tasks in the adapters, got 'mt' in two",
        "same-word": f"other embeddings of word {WORDS}",
        "lora": "expected adapters of the method 'vlm', got 'lora'",
        "other-words": f"one base model, got vocab_size {WORDS + 3} in .* and vocab_size",
        "head": "got base_model.classifier.* in .*head, of which it has one",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            join_adapters([tmp_path / "a", tmp_path / name], tmp_path / "out")
    with pytest.raises(ValueError, match="two adapters at least, got 1"):
        join_adapters([tmp_path / "a"], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="expected pelt_config.json"):
        join_adapters([tmp_path / "a", tmp_path / "absent"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
