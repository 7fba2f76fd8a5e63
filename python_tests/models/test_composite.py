"""Free combinations of parts that replace Linears, and the parallel adapter's place in a layer.

The parts that add to a layer are held to their formulas in test_unipelt_formula.py.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from every_method import EXPERTS, METHODS, PARALLEL, PREFIX, PRUNED
from safetensors import safe_open
from safetensors.torch import save_file
from test_adamix import Literal as LiteralExperts
from test_pst import Literal as LiteralPruned

from pelt_kernels.methods import BottleneckAdapterConfig, CompositeConfig, LoraConfig
from pelt_kernels.models import PeltModel, get_pelt_model
from pelt_kernels.nn import Bank, PrunedLinear


def test_pruned_linears_experts_and_added_parts_are_their_formulas_at_once(
    make_base, make_batch, randomise, draws
):
    """The literal Linears of two papers in a plain model, and the other parts put over them."""
    base, batch = make_base(dtype=torch.float64), make_batch()
    plain = copy.deepcopy(base)
    experts = replace(EXPERTS, consistency=0.0)
    rest = {"adapter": PARALLEL, "prefix": PREFIX}
    rest["lora"] = LoraConfig(r=4, targets=("key", "attention_output"))
    both = CompositeConfig(adamix=experts, pst=PRUNED, **rest)
    model = randomise(get_pelt_model(base, both), std=0.05).train()
    model.set_progress(0.4)
    found = model(**batch)
    made = dict(model.base_model.named_modules())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(dict(base.named_parameters())[name])
    literal = get_pelt_model(plain, CompositeConfig(**rest)).train()
    literal.load_state_dict(
        {n: v for n, v in model.state_dict().items() if n in literal.state_dict()}
    )
    assert sum(isinstance(module, PrunedLinear) for module in made.values()) == 2 * 2
    assert sum(isinstance(module, Bank) for module in made.values()) == 2 * 2
    for name, module in made.items():
        if isinstance(module, PrunedLinear):
            assert 0 < module.sparsity < PRUNED.sparsity
            new = LiteralPruned(plain.get_submodule(name), module)
        elif isinstance(module, Bank):
            (drawn,) = draws[module]
            new = LiteralExperts(plain.get_submodule(name), module, experts, drawn)
        else:
            continue
        # The parallel adapter's hook hangs on the FFN's first Linear, which is replaced here.
        old = plain.get_submodule(name)
        new._forward_pre_hooks.update(old._forward_pre_hooks)
        new.__dict__.update({k: v for k, v in old.__dict__.items() if k == "_pelt_state"})
        plain.set_submodule(name, new)
    expected = literal(**batch)
    torch.testing.assert_close(found.loss, expected.loss, rtol=0, atol=1e-10)
    wanted = dict(literal.named_parameters())
    names = [n for n in model.trained_parameters() if n in wanted]
    own = [
        parameter
        for module in made.values()
        if isinstance(module, (PrunedLinear, Bank))
        for parameter in module.parameters(recurse=False)
        if parameter.requires_grad and parameter.ndim > 1
    ]
    # The literal model's LoRA, adapter, prefix and head; then what the literal Linears read.
    assert len(names) == 2 * (4 + 4) + 3 + 4 + 2 and len(own) == 2 * (2 * 4 + 2 * 2)
    got = torch.autograd.grad(found.loss, [dict(model.named_parameters())[n] for n in names] + own)
    should = torch.autograd.grad(expected.loss, [wanted[n] for n in names] + own)
    for one, other in zip(got, should, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def test_a_parallel_adapter_of_the_papers_start_is_the_base_model(make_base, make_batch):
    base, batch = make_base(), make_batch(with_labels=False)
    expected = base(**batch).logits
    assert torch.equal(get_pelt_model(base, PARALLEL)(**batch).logits, expected)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra"])
def test_a_parallel_adapter_reads_the_input_of_the_ffn_and_not_its_output(
    family, make_base, make_batch, randomise
):
    """Beside an FFN whose output is a constant it still sees the sentence; scale 0 removes it."""
    for scale, is_seen in ((1.0, True), (0.0, False)):
        base, batch = make_base(family), make_batch((5, 5), with_labels=False)
        layer = {"distilbert": "transformer.layer.1"}.get(family, "encoder.layer.1")
        slot = {"distilbert": "ffn.lin2"}.get(family, "output.dense")
        config = BottleneckAdapterConfig(bottleneck=4, placement="parallel", scale=scale)
        without = copy.deepcopy(base)
        for one in (base, without):
            one.base_model.get_submodule(f"{layer}.{slot}").weight.data.zero_()
        model = randomise(get_pelt_model(base, config))
        for name, parameter in without.named_parameters():
            parameter.data.copy_(dict(base.named_parameters())[name])
        assert torch.equal(model(**batch).logits, without(**batch).logits) != is_seen


def test_a_parallel_adapter_refuses_slices_of_the_ffn(make_base):
    with pytest.raises(ValueError, match="chunk_size_feed_forward=0 with a parallel adapter"):
        get_pelt_model(make_base(chunk_size_feed_forward=2), PARALLEL)


def test_nothing_is_left_on_the_layers(make_base, make_batch):
    base, batch = make_base(), make_batch()
    model = get_pelt_model(base, METHODS["composite"])
    model(**batch)
    assert all(state.in_flight.ffn_input is None for state in model._injection.states)
    model.remove()
    assert not [m for m in base.modules() if m._forward_pre_hooks or "_pelt_state" in m.__dict__]


def test_experts_of_a_composite_merge_bit_for_bit(make_base, make_batch, randomise, tmp_path):
    model = randomise(get_pelt_model(make_base(), METHODS["composite-adamix"])).eval()
    batch = make_batch(with_labels=False)
    model.set_progress(1.0)
    with torch.no_grad():
        expected = model(**batch).logits
        model.merge_experts()
        assert torch.equal(model(**batch).logits, expected)
        assert model.method_config.adamix.experts == 1
        model.save_pretrained(tmp_path)
        again = PeltModel.from_pretrained(make_base(), tmp_path)
        assert torch.equal(again(**batch).logits, expected)


def test_a_prefix_of_a_composite_collapses(make_base, make_batch, randomise, tmp_path):
    model = randomise(get_pelt_model(make_base(), METHODS["mam"]))
    batch = make_batch(with_labels=False)
    expected = model(**batch).logits
    model.collapse_prefix()
    assert model.method_config.prefix.mid is None
    model.save_pretrained(tmp_path)
    again = PeltModel.from_pretrained(make_base(), tmp_path)
    assert torch.equal(again(**batch).logits, expected)


def test_an_adapter_saved_before_a_field_came_still_loads(make_base, make_batch, tmp_path):
    """The placement of an adapter is younger than the format of its file."""
    model = get_pelt_model(make_base(), BottleneckAdapterConfig(bottleneck=4))
    model.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "pelt_config.json").read_text())
    for name in ("placement", "scale", "start"):
        described["config"].pop(name)
    (tmp_path / "pelt_config.json").write_text(json.dumps(described))
    path = tmp_path / "pelt_model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    header = json.dumps(described["config"], sort_keys=True)
    save_file(tensors, path, metadata={"format": "pt", "pelt_kernels": header})
    again = PeltModel.from_pretrained(make_base(), tmp_path)
    batch = make_batch(with_labels=False)
    assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)
