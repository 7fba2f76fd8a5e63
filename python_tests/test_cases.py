"""What a case's words stand for."""

from __future__ import annotations

import pytest
import torch
from cases import Case, cases_of, given_in, make_inputs, shapes_of

from pelt_kernels.ops import OPERATORS
from pelt_kernels.ops._dispatch import contract_of

BRANCHES = {"B": 2, "S": 3, "Din": 8, "Dout": 4, "R_i": (2, 5), "size_i": (4, 4)}
BANKS = {"M_i": (3, None), "N_i": (None, None)}


def shapes(operator, sizes, inputs):
    contract = contract_of(operator).CONTRACT
    found = shapes_of(contract, Case("words", sizes, inputs))
    return dict(zip(contract.input_names, found))


def test_words_choose_among_the_shapes_of_the_contract():
    found = shapes("gated_adapter", {}, "bank w_down, b_up, gate per row, down_index per sample")
    assert found["w_down"] == [("M", "R", "D")] and found["w_up"] == [("D", "R")]
    assert found["b_down"] == [] and found["b_up"] == [("D",)]
    assert found["gate"] == [("B", "S")] and found["down_index"] == [("B",)]
    assert shapes("lora_linear", {}, "transposed weight")["weight"] == [("Din", "Dout")]
    bias = shapes("prefix_attention", {}, "bias shared by heads")["bias"]
    assert bias == [("B", "1", "S", "N")]


def test_lists_have_an_element_for_each_of_their_sizes():
    words = "bank a[0], a_index[0] per sample, gate, gate_weight[1], 2 extra_weight"
    found = shapes("lora_linear", BRANCHES | BANKS, words)
    assert found["a"] == [("M_i", "R_i", "Din"), ("R_i", "Din")]
    assert found["b"] == [("size_i", "R_i")] * 2
    assert found["a_index"] == [("B",), None] and found["b_index"] == [None, None]
    assert found["gate"] == [("B",)] * 2 and found["gate_weight"] == [None, ("Din",)]
    assert found["extra_weight"] == [("Din",)] * 2 and found["extra_bias"] == []
    assert given_in(Case("words", {}, words)) == {
        "a", "a_index", "gate", "gate_weight", "extra_weight",
    }  # fmt: skip


@pytest.mark.parametrize("words", ["gat", "gate per", "gate:1", "bank  w_down", "gate, ", "b_up b"])
def test_a_word_that_says_nothing_is_refused(words):
    with pytest.raises(ValueError, match="gated_adapter, case words: no such input"):
        shapes("gated_adapter", {}, words)


@pytest.mark.parametrize("words", ["bank gate", "gate per head", "transposed b_up", "bank scale"])
def test_a_shape_that_the_contract_has_not_is_refused(words):
    with pytest.raises(ValueError, match="gated_adapter, case words: no such shape"):
        shapes("gated_adapter", {}, words)


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_case_is_a_call_that_the_contract_takes(operator):
    contract = contract_of(operator).CONTRACT
    names = [case.id for case in cases_of(operator)]
    assert len(set(names)) == len(names)
    for case in cases_of(operator):
        first, again = (make_inputs(contract, case, torch.float32) for _ in range(2))
        for value, other in zip(first, again):
            pairs = zip(value, other) if isinstance(value, list) else [(value, other)]
            assert all(a is None or torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
