"""Generation with Control Prefixes: every beam keeps the labels of its own sentence, a cache changes
nothing, a batch is its sentences one by one; and a few pairs of text are learned by heart.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from families import PAD
from language_models import END, FAMILIES, START, make_language_model, make_pairs

from pelt_kernels.methods import ControlPrefixesConfig
from pelt_kernels.models import call as model_call
from pelt_kernels.models import get_pelt_model

CONTROL = ControlPrefixesConfig(prefix_length=3, mid=8, attributes={"style": 5})
LABELS = torch.tensor([4, 0, 2])
PAIRS = Path("/work/shared/data/e2e/valid.tsv")
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def make(randomise):
    """Models that write other words with each label."""

    def make(family):
        base = make_language_model(family, tie_word_embeddings=False)
        if family == "t5":
            # Its words are large beside what attention adds to them, and would write themselves.
            base.shared.weight.data.mul_(0.1)
        return randomise(get_pelt_model(base, CONTROL), std=1.0, seed=3)

    return make


def generate(model, batch, labels=LABELS, **options):
    """The words, without what was read and what follows the end, and each one's score."""
    options = {"max_new_tokens": 7, "min_new_tokens": 4} | options
    out = model.generate(
        batch["input_ids"], attention_mask=batch["attention_mask"], attributes={"style": labels},
        return_dict_in_generate=True, output_scores=True, do_sample=False, **options,
    )  # fmt: skip
    words = out.sequences
    read = 1 if model.base_model.config.is_encoder_decoder else batch["input_ids"].shape[1]
    return [row[read:] for row in without_end(words.tolist())], out.get("sequences_scores")


def without_end(rows):
    """Each row up to its end, which may be its beginning, too."""
    return [row[: row.index(END, 1)] if END in row[1:] else row for row in rows]


def one(batch, b):
    return {name: value[b : b + 1] for name, value in batch.items()}


@every_family
@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_is_its_sentences_one_by_one(family, beams, make):
    model, batch = make(family), make_pairs(family)
    words, scores = generate(model, batch, num_beams=beams)
    for b in range(3):
        alone, score = generate(model, one(batch, b), LABELS[b : b + 1], num_beams=beams)
        assert alone == [words[b]]
        if beams > 1:
            torch.testing.assert_close(score, scores[b : b + 1], rtol=0, atol=1e-4)
    # The labels are what makes the difference, so that a mix-up would be seen.
    others, _ = generate(model, batch, LABELS.roll(1), num_beams=beams)
    assert all(other != mine for other, mine in zip(others, words))


@every_family
def test_beams_that_are_tiled_instead_of_interleaved_are_seen(family, make, monkeypatch):
    """The order of the authors' code, in which a beam has another sentence's labels."""
    model, batch = make(family), make_pairs(family)
    words, scores = generate(model, batch, num_beams=3)
    label = model_call.Call.label

    def tiled(call, name, batch):
        given = label(call, name, len(call.labels[name]))
        return given.repeat(batch // len(given))

    monkeypatch.setattr(model_call.Call, "label", tiled)
    wrong, other_scores = generate(model, batch, num_beams=3)
    assert wrong != words and (other_scores - scores).abs().max() > 1e-3
    assert generate(model, batch)[0] == generate(model, batch, num_beams=1)[0]


@every_family
@pytest.mark.parametrize("beams", [1, 3])
def test_with_a_cache_as_without(family, beams, make):
    model, batch = make(family), make_pairs(family)
    words, scores = generate(model, batch, num_beams=beams, use_cache=True)
    again, other_scores = generate(model, batch, num_beams=beams, use_cache=False)
    assert again == words
    if beams > 1:
        torch.testing.assert_close(scores, other_scores, rtol=0, atol=1e-4)


@every_family
def test_several_answers_for_each_sentence_keep_its_labels(family, make):
    model, batch = make(family), make_pairs(family)
    words, _ = generate(model, batch, num_beams=3, num_return_sequences=2)
    assert len(words) == 6
    for b in range(3):
        alone, _ = generate(
            model, one(batch, b), LABELS[b : b + 1], num_beams=3, num_return_sequences=2
        )
        assert alone == words[2 * b : 2 * b + 2]


@every_family
def test_collapsed_prefixes_write_the_same(family, make):
    model, batch = make(family), make_pairs(family)
    words, scores = generate(model, batch, num_beams=3)
    model.collapse_prefix()
    again, same = generate(model, batch, num_beams=3)
    assert again == words and torch.equal(scores, same)


def read_pairs(sentences=2, styles=4):
    """(source, style, target): the shortest targets of some sources, one for each style."""
    if not PAIRS.is_file():
        pytest.skip(f"{PAIRS} is not on this machine")
    targets = {}
    with PAIRS.open() as file:
        for row in csv.DictReader(file, delimiter="\t"):
            targets.setdefault(row["source"], {})[row["target"]] = None
    found = [(source, sorted(kept, key=lambda t: len(t.split()))[:styles])
             for source, kept in targets.items() if len(kept) >= styles][:sentences]  # fmt: skip
    return [(source, style, target) for source, kept in found for style, target in enumerate(kept)]


def padded(rows, left=False):
    width = max(map(len, rows))
    full = [[PAD] * (width - len(r)) + r if left else r + [PAD] * (width - len(r)) for r in rows]
    return torch.tensor(full)


def as_batch(family, sources, targets):
    """GPT-2 reads the source, a START, and goes on with the target."""
    if family != "gpt2":
        ids, labels = padded(sources), padded(targets)
        return {
            "input_ids": ids,
            "attention_mask": ids.ne(PAD).long(),
            "labels": labels.masked_fill(labels == PAD, -100),
        }
    ids = padded([[*s, START, *t] for s, t in zip(sources, targets)])
    labels = padded([[PAD] * (len(s) + 1) + t for s, t in zip(sources, targets)])
    labels = labels.masked_fill(labels == PAD, -100)
    return {"input_ids": ids, "attention_mask": ids.ne(PAD).long(), "labels": labels}


def fit(model, batch, steps, lr):
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * max(0.05, 1 - step / steps)
    )
    model.train()
    for _ in range(steps):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


@every_family
def test_styles_of_the_same_source_are_learned_by_heart(family):
    """A base model that knows the pairs, but not which style is asked for, is frozen; its control
    prefixes then decide it, in batches of 4 with beams.
    """
    pairs = read_pairs()
    known = sorted({word for s, _, t in pairs for word in f"{s} {t}".split()})
    number = {word: i + 4 for i, word in enumerate(known)}
    sources = [[number[word] for word in s.split()] for s, _, _ in pairs]
    targets = [[number[word] for word in t.split()] + [END] for _, _, t in pairs]
    styles = torch.tensor([style for _, style, _ in pairs])
    batch = as_batch(family, sources, targets)
    base = make_language_model(family, words=len(known) + 4, std=0.15)
    fit(base, batch, steps=60, lr=1e-2)
    config = ControlPrefixesConfig(
        prefix_length=4, mid=32, attributes={"style": 4}, attribute_length=4, start="normal"
    )
    model = get_pelt_model(base, config)
    fit(model, batch | {"attributes": {"style": styles}}, steps=80, lr=2e-2)

    def written(labels):
        found = []
        for first in range(0, len(pairs), 4):
            some = slice(first, first + 4)
            if family == "gpt2":
                ids = padded([[*s, START] for s in sources[some]], left=True)
            else:
                ids = padded(sources[some])
            read = {"input_ids": ids, "attention_mask": ids.ne(PAD).long()}
            options = {"num_beams": 3, "max_new_tokens": 40, "min_new_tokens": 1}
            found += generate(model, read, labels[some], **options)[0]
        return found

    expected = [target[:-1] for target in targets]
    assert written(styles) == expected
    rolled = styles.view(2, 4).roll(1, dims=1).flatten()
    assert written(rolled) == [expected[4 * (i // 4) + int(rolled[i])] for i in range(8)]
