"""Relations of gates to traits of texts, and differences of models, against scipy and by design."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import spearmanr

from pelt_kernels.training.gate_report import comparison
from pelt_kernels.training.gate_report.active import active_findings, active_rows
from pelt_kernels.training.gate_report.comparison import differences
from pelt_kernels.training.gate_report.measure import Outcome
from pelt_kernels.training.gate_report.relations import Trait, relations
from pelt_kernels.training.problems import Classification

ROWS = 120


def eta_squared(values: np.ndarray, codes: np.ndarray) -> float:
    """The share of the variance that lies between groups, by its definition."""
    groups = [values[codes == code] for code in np.unique(codes)]
    between = sum(len(group) * (group.mean() - values.mean()) ** 2 for group in groups)
    return between / ((values - values.mean()) ** 2).sum()


def drawn(seed: int) -> tuple[np.random.Generator, np.ndarray]:
    draw = np.random.default_rng(seed)
    return draw, draw.normal(0.5, 0.1, size=(ROWS, 6))


def test_statistics_are_those_of_their_names():
    draw, gates = drawn(0)
    codes, numbers = draw.integers(0, 3, ROWS), draw.integers(3, 9, ROWS)
    sets = draw.integers(0, 2, (ROWS, 4))
    traits = [
        Trait.of_groups("label", codes),
        Trait.of_numbers("length", numbers),
        Trait.of_sets("label", sets),
    ]
    label, length, several = (each.values for each in relations(gates, traits, 20))
    for k, gate in enumerate(gates.T):
        assert label[k] == pytest.approx(eta_squared(gate, codes))
        assert length[k] == pytest.approx(spearmanr(gate, numbers).statistic)
        assert several[k] == pytest.approx(max(eta_squared(gate, each) for each in sets.T))


def test_a_planted_relation_is_found_and_no_other():
    draw, gates = drawn(1)
    codes, numbers = draw.integers(0, 3, ROWS), draw.integers(3, 40, ROWS)
    gates[:, 2] += 0.01 * numbers
    gates[:, 4] += 0.15 * (codes == 1)
    gates[:, 5] = 0.5
    traits = [Trait.of_groups("label", codes), Trait.of_numbers("length", numbers)]
    label, length = relations(gates, traits, 500)
    assert label.is_found.tolist() == [False, False, False, False, True, False]
    assert length.is_found.tolist() == [False, False, True, False, False, False]
    assert label.p[5] == length.p[5] == 1.0  # a constant relates to nothing
    again = relations(gates, traits, 500)
    assert [each.p.tolist() for each in again] == [label.p.tolist(), length.p.tolist()]


def test_among_many_gates_without_any_relation_one_is_rarely_found():
    """In 5 % of data sets at most, but for chance: of 60 more than 7 with probability 0.01."""
    found = 0
    for seed in range(60):
        draw, gates = drawn(100 + seed)
        traits = [
            Trait.of_groups("label", draw.integers(0, 2, ROWS)),
            Trait.of_numbers("length", draw.integers(3, 40, ROWS)),
        ]
        found += any(each.is_found.any() for each in relations(gates, traits, 200))
    assert found <= 7


def outcome(logits: np.ndarray, labels: np.ndarray) -> Outcome:
    right = logits.argmax(axis=1) == labels
    shifted = logits - logits.max(axis=1, keepdims=True)
    loss = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]
    return Outcome(
        Classification(), logits, labels, loss, None, right, (), np.empty((len(labels), 0))
    )


@pytest.mark.parametrize("metric", ["accuracy", "matthews"])
def test_a_difference_is_an_effect_only_beyond_noise(metric, monkeypatch):
    monkeypatch.setattr(comparison, "SLOW_DRAWS", 60)
    draw = np.random.default_rng(3)
    labels = draw.integers(0, 2, 200)
    logits = draw.normal(size=(200, 2))
    logits[np.arange(200), labels] += 1.5
    untouched = outcome(logits, labels)
    noisy = outcome(logits + draw.normal(scale=0.1, size=logits.shape), labels)
    broken = outcome(draw.normal(size=logits.shape), labels)
    same, noise, harm = differences(untouched, [untouched, noisy, broken], metric)
    for difference in same:
        assert difference.value == 0.0 and difference.interval == (0.0, 0.0)
        assert not difference.is_effect
    assert not noise[0].is_effect
    score, loss = harm
    assert score.value == pytest.approx(broken.score(metric) - untouched.score(metric))
    assert loss.value == pytest.approx(broken.loss.mean() - untouched.loss.mean())
    assert score.interval[0] < score.value < score.interval[1] < 0
    assert score.is_effect and loss.is_effect


def test_accuracy_by_means_is_accuracy_by_scores(monkeypatch):
    """The quick way for a mean over rows gives what drawing rows and scoring them does."""
    monkeypatch.setattr(comparison, "SLOW_DRAWS", 100)
    draw = np.random.default_rng(4)
    labels = draw.integers(0, 2, 300)
    first = outcome(draw.normal(size=(300, 2)) + 2 * np.eye(2)[labels], labels)
    second = outcome(draw.normal(size=(300, 2)) + np.eye(2)[labels], labels)
    ((quick, _),) = differences(first, [second], "accuracy")
    ((slow, _),) = differences(replace(first, right=None), [second], "accuracy")
    assert quick.value == pytest.approx(slow.value)
    assert quick.interval == pytest.approx(slow.interval, abs=0.02)


def test_sentences_on_what_is_skipped_follow_from_the_numbers():
    def rows(*parts):
        return [
            {"threshold": t, "parts": p, "parameters": 100 * p, "added_flops": p, "base_flops": 4.0,
             "flops_share": p / 4}
            for t, p in zip((0.0, 0.1, 0.5), parts, strict=True)
        ]  # fmt: skip

    active = {"trained": 500, "stored": 100, "why_not": "", "thresholds": rows(1, 1, 1)}
    assert active_findings(active) == [
        "500 parameters are trained and 100 stored.",
        "No gate is below 0.5, so up to that threshold there is nothing to skip.",
        "All that the method adds is 25 % of what the layers multiply without it, so skipping "
        "everything would save 20 % of the operations.",
    ]
    active = active | {"trained": 100, "thresholds": rows(1, 0.9999, 0.25)}
    size, skipped, _ = active_findings(active)
    assert size == "100 parameters are trained and stored."
    assert skipped == (
        "At 0.1 a text skips 0.1 % of its parts and uses 99.9 % of the stored parameters. At 0.5 a "
        "text skips 75 % of its parts and uses 25 % of the stored parameters."
    )
    skipped = active_findings(active | {"thresholds": rows(1, 1, 0.25)})[1]
    assert skipped.startswith("Up to a threshold of 0.1 nothing is skipped. At 0.5 a text skips")
    assert active_rows(active)[2] == ("0.5", "25 %", "25", "25 %", "0.0 M", "6.2 %")
    assert "is not counted: a reason." in active_findings(active | {"why_not": "a reason"})[1]
