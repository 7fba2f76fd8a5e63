"""Every method in every family: what the table says of each pair."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from every_method import ADAPTER, METHODS
from families import OF_IMAGES, PAD, READERS, WORDS, WRITERS, make_reader, make_writer

from benchmarks import families_table, readme
from pelt_kernels.methods import PRESETS, AdaMixConfig, CompositeConfig, LoraConfig
from pelt_kernels.models import FAMILIES, get_pelt_model

BEHIND_AN_ENCODER = ("bart", "mbart", "mt5", "t5")
# By the names of the table, in sizes for the tests; a composite of parts that every family can have.
CONFIGS = {name: METHODS[name] for name in PRESETS if name in METHODS} | {
    "adamix": AdaMixConfig(bottleneck=4),
    "composite": CompositeConfig(
        adapter=replace(ADAPTER, gated=True), lora=LoraConfig(r=4, targets=("query", "ffn_in"))
    ),
    "control_prefixes": replace(METHODS["control-prefixes"], attributes={"source": 3}),
}
PAIRS = [(method, family) for method in PRESETS for family in FAMILIES]
ABLE = [pair for pair in PAIRS if families_table.gap_of(*pair) is None]
UNABLE = [pair for pair in PAIRS if families_table.gap_of(*pair) is not None]


def make(family, make_base):
    if family in WRITERS:
        return make_writer(family)
    return make_reader(family) if family in READERS else make_base(family)


def inputs_of(method, family):
    """Two texts or images, and what a step wants beside them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, WORDS, (2, 6), generator=generator)
    ids[0, 4:] = PAD
    given = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    if family in OF_IMAGES:
        given = {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    if family in WRITERS:
        given["labels"] = torch.where(ids != PAD, ids, -100)
    elif family != "clip_vision_model":
        given["labels"] = torch.tensor([2, 0])
    if method == "control_prefixes":
        given["attributes"] = {"source": torch.tensor([1, 2])}
    return given


def loss_of(model, inputs):
    outputs = model(**inputs)
    if "labels" in inputs:
        return outputs.loss
    return torch.nn.functional.cross_entropy(outputs.pooler_output, torch.tensor([2, 0]))


def config_of(method, family):
    # A tower has no loss of its own that a consistency could be added to.
    config = CONFIGS[method]
    is_bare = family == "clip_vision_model" and method == "adamix"
    return replace(config, consistency=0.0) if is_bare else config


@pytest.mark.parametrize(("method", "family"), ABLE)
def test_ten_steps_lower_the_loss_and_a_writer_writes(method, family, make_base):
    model = get_pelt_model(make(family, make_base), config_of(method, family)).train()
    inputs = inputs_of(method, family)
    optimizer = torch.optim.AdamW(model.trained_parameters().values(), lr=5e-3)
    losses = []
    for step in range(10):
        torch.manual_seed(0)
        model.set_progress(step / 40)
        loss = loss_of(model, inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    if family in WRITERS:
        asked = {name: value for name, value in inputs.items() if name != "labels"}
        if family not in BEHIND_AN_ENCODER:
            asked = {n: v.flip(-1) if n != "attributes" else v for n, v in asked.items()}
        with torch.no_grad():
            written = model.eval().generate(
                **asked, max_new_tokens=2, do_sample=False, eos_token_id=None
            )
        assert written.shape == (2, 3 if family in BEHIND_AN_ENCODER else 8)


@pytest.mark.parametrize(("method", "family"), UNABLE)
def test_a_gap_of_the_table_is_refused_with_its_words(method, family, make_base):
    with pytest.raises(ValueError, match=families_table.gap_of(method, family).why):
        get_pelt_model(make(family, make_base), config_of(method, family))


def test_the_table_names_what_there_is():
    assert set(CONFIGS) == set(PRESETS)
    for gap in families_table.GAPS:
        assert set(gap.methods) <= set(PRESETS) and set(gap.families) <= set(FAMILIES)
    page = Path(readme.FAMILIES).read_text()
    assert readme.block(page, "families") == families_table.table()
