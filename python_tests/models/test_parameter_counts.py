"""Numbers of trained and of stored parameters against the formulas and totals of UniPELT's BERT-base."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from pelt_kernels.methods import (
    BitFitConfig,
    BottleneckAdapterConfig,
    FullConfig,
    HeadConfig,
    LoraConfig,
    PrefixTuningConfig,
    UniPELTConfig,
)
from pelt_kernels.models import get_pelt_model

D, L, P, MID, R_ADAPTER, R_LORA, LABELS = 768, 12, 10, 512, 48, 8, 2
GATE = D + 1
HEAD = D * LABELS + LABELS
ADAPTER = L * (2 * D * R_ADAPTER + D + R_ADAPTER)
LORA = L * 2 * (2 * D * R_LORA)
PREFIX_KEPT = L * 2 * P * D
PREFIX_TRAINED = P * D + (D * MID + MID) + (MID * 2 * L * D + 2 * L * D)
FLAT = PrefixTuningConfig(mid=None)

CASES = {
    "head": (HeadConfig(), 0),
    "adapter": (BottleneckAdapterConfig(), ADAPTER),
    "adapter-gated": (BottleneckAdapterConfig(gated=True), ADAPTER + L * GATE),
    "lora": (LoraConfig(), LORA),
    "lora-gated": (LoraConfig(gated=True), LORA + 2 * L * GATE),
    "prefix": (PrefixTuningConfig(), PREFIX_TRAINED),
    "prefix-kept": (FLAT, PREFIX_KEPT),
    "prefix-gated": (PrefixTuningConfig(gated=True), PREFIX_TRAINED + L * GATE),
    "ap": (UniPELTConfig.ap(), ADAPTER + PREFIX_TRAINED + 2 * L * GATE),
    "apl": (UniPELTConfig.apl(), ADAPTER + LORA + PREFIX_TRAINED + 4 * L * GATE),
    "apl-kept": (UniPELTConfig(prefix=FLAT), ADAPTER + LORA + PREFIX_KEPT + 4 * L * GATE),
    "apl-nogate": (UniPELTConfig.apl(gated=False), ADAPTER + LORA + PREFIX_TRAINED),
    "bitfit": (BitFitConfig(), 102_912),
}


@pytest.fixture(scope="module")
def bert_base():
    with torch.device("meta"):
        return hf.BertForSequenceClassification(hf.BertConfig(num_labels=LABELS))


def test_the_formulas_are_the_published_totals():
    assert (ADAPTER, LORA, PREFIX_KEPT, PREFIX_TRAINED) == (894_528, 294_912, 184_320, 9_857_024)
    assert ADAPTER + LORA + PREFIX_KEPT + 4 * L * GATE == 1_410_672


@pytest.mark.parametrize("case", CASES)
def test_trained_parameters_of_bert_base(case, bert_base, capsys):
    config, expected = CASES[case]
    model = get_pelt_model(bert_base, config)
    trainable, total = model.get_nb_trainable_parameters()
    added = sum(p.numel() for p in model.parameters()) - 109_483_778
    stored = model.get_nb_stored_parameters()
    model.print_trainable_parameters()
    model.remove()
    assert trainable - HEAD == expected
    has_network = "prefix_length" in str(config) and "mid=512" in str(config)
    assert stored - HEAD == expected - has_network * (PREFIX_TRAINED - PREFIX_KEPT)
    assert total == 109_483_778 + added
    assert added == (0 if case in ("head", "bitfit") else expected)
    printed = capsys.readouterr().out
    for part in (f"trainable params: {trainable:,}", f"all params: {total:,}"):
        assert f"{part} ||" in printed
    assert printed.endswith(f" || stored params: {stored:,}\n")


def test_everything_of_bert_base(bert_base):
    model = get_pelt_model(bert_base, FullConfig())
    assert model.get_nb_trainable_parameters() == (109_483_778, 109_483_778)
