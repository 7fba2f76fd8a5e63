"""Encoders that are not shaped as BERT is, with every method that they can have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from every_method import METHODS
from families import OF_IMAGES, OWN_ATTENTION, PAD, READERS, WORDS, make_reader

from pelt_kernels.methods import (
    AdaMixConfig,
    BitFitConfig,
    LoraConfig,
    PrefixTuningConfig,
    UniPELTConfig,
    parts_of,
    with_part_changes,
)
from pelt_kernels.models import PeltModel, get_pelt_model
from pelt_kernels.models.export import matrices_of

READING = tuple(family for family in READERS if family not in OF_IMAGES)
CHOSEN = (
    "unipelt", "adapter", "parallel-adapter", "prefix", "lora", "adamix", "adamix-lora", "pst",
    "bitfit", "composite", "full",
)  # fmt: skip


def config_of(method, family):
    """The method in sizes for the tests; without what the family refuses."""
    config = METHODS[method]
    if parts_of(config).mixture is not None:
        config = with_part_changes(config, AdaMixConfig, consistency=0.0)
    if family in OWN_ATTENTION and parts_of(config).prefix is not None:
        return replace(config, prefix=None) if method != "prefix" else None
    if family == "modernbert" and method == "composite":
        return replace(config, bitfit=False)
    return None if (family, method) == ("modernbert", "bitfit") else config


PAIRS = [(m, f) for m in CHOSEN for f in READERS if config_of(m, f) is not None]


def batch(family, lengths=(9, 4, 7), width=9):
    """Three texts, padded behind, or three images; and their labels."""
    generator = torch.Generator().manual_seed(1)
    if family in OF_IMAGES:
        return {"pixel_values": torch.randn(3, 3, 8, 8, generator=generator)}
    ids = torch.randint(5, WORDS, (3, 32), generator=generator)[:, :width]
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    return {"input_ids": torch.where(mask, ids, PAD), "attention_mask": mask.long()}


def output(model, inputs):
    """The logits, or the features of a tower without a head."""
    outputs = model(**inputs)
    return outputs.logits if "logits" in outputs else outputs.pooler_output


def loss_of(model, inputs):
    return torch.nn.functional.cross_entropy(output(model, inputs), torch.arange(3))


def randomised(model, std=0.1):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.trained_parameters().values():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(("method", "family"), PAIRS)
def test_training_saving_and_going_back(method, family, tmp_path):
    """Ten steps lower the loss and move what they train; files hold it; the base comes back."""
    base, inputs = make_reader(family), batch(family)
    first = {name: value.clone() for name, value in base.state_dict().items()}
    with torch.no_grad():
        untouched = output(base, inputs)
    model = get_pelt_model(base, config_of(method, family)).train()
    parameters = model.trained_parameters()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=5e-3)
    losses = []
    for step in range(10):
        torch.manual_seed(step)
        model.set_progress(step / 40)
        loss = loss_of(model, inputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    now = dict(model.named_parameters())
    moved = {name for name, value in before.items() if not torch.equal(now[name], value)}
    assert moved <= set(parameters)
    unread = ("pooler", "position", "embeddings", "rel_embeddings", "relative", "post_layernorm")
    still = [n for n in set(parameters) - moved if not any(word in n for word in unread)]
    assert not still, still
    model.eval()
    model.set_progress(1.0)
    with torch.no_grad():
        expected = output(model, inputs)
    assert (expected - untouched).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    again = PeltModel.from_pretrained(make_reader(family), tmp_path)
    with torch.no_grad():
        assert torch.equal(output(again, inputs), expected)
    if method == "full":
        return
    back = model.remove()
    assert back is base and not isinstance(back, PeltModel)
    for name, value in back.state_dict().items():
        assert torch.equal(value, first[name]), name
    with torch.no_grad():
        assert torch.equal(output(back, inputs), untouched)


@pytest.mark.parametrize("family", READERS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_parts_that_are_neutral_leave_the_base_models_output(family, attention):
    """LoRA at its start, and where prefixes can be, those of length 0 in all layers or in one."""
    inputs = batch(family)
    expected = output(make_reader(family, attention), inputs)
    model = get_pelt_model(make_reader(family, attention), METHODS["lora"])
    torch.testing.assert_close(output(model, inputs), expected, rtol=1e-4, atol=1e-5)
    empty = PrefixTuningConfig(prefix_length=0, mid=None)
    layers = len(model._injection.states)
    for skipped in ((), tuple(range(1, layers))) if family not in OWN_ATTENTION else ():
        config = replace(empty, skip_layers=skipped)
        model = get_pelt_model(make_reader(family, attention), config)
        torch.testing.assert_close(output(model, inputs), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", READING)
@pytest.mark.parametrize("method", ["unipelt", "composite", "adamix"])
@torch.no_grad()
def test_padding_is_harmless(method, family):
    """Alone, padded a little and padded much: the same logits, and with plain means others."""
    config = config_of(method, family)
    model = randomised(get_pelt_model(make_reader(family), config)).eval()
    logits = output(model, batch(family))
    more = output(model, batch(family, width=14))
    torch.testing.assert_close(more, logits, rtol=1e-4, atol=1e-5)
    for row, length in enumerate((9, 4, 7)):
        alone = {name: value[row : row + 1, :length] for name, value in batch(family).items()}
        torch.testing.assert_close(
            output(model, alone), logits[row : row + 1], rtol=1e-4, atol=1e-5
        )
    if method == "unipelt":
        config = replace(config, gate_pooling="mean")
        model = randomised(get_pelt_model(make_reader(family), config)).eval()
        moved = output(model, batch(family, width=14)) - output(model, batch(family))
        assert moved.abs().max() > 1e-4


@pytest.mark.parametrize("family", READERS)
def test_gates_and_checkpointing_in_each_layer(family):
    """Each layer has its gates; the gradients are the same where layers are computed again."""
    config = config_of("unipelt", family)
    model = randomised(get_pelt_model(make_reader(family), config)).train()
    model.record_gates()
    loss_of(model, batch(family)).backward()
    layers = len(model._injection.states)
    kinds = {"adapter", "lora_query", "lora_value", "prefix"}
    kinds -= {"prefix"} if family in OWN_ATTENTION else set()
    assert set(model.gate_values()) == {(i, kind) for i in range(layers) for kind in kinds}
    if not model.base_model.supports_gradient_checkpointing:
        return
    expected = {name: p.grad.clone() for name, p in model.trained_parameters().items()}
    model.zero_grad()
    for options in ({"use_reentrant": True}, {"use_reentrant": False}):
        model.gradient_checkpointing_enable(options)
        loss_of(model, batch(family)).backward()
        for name, parameter in model.trained_parameters().items():
            torch.testing.assert_close(parameter.grad, expected[name], msg=name)
        model.zero_grad()


@torch.no_grad()
def test_albert_has_one_set_of_parts_for_all_its_layers():
    one = get_pelt_model(make_reader("albert"), METHODS["unipelt"])
    six = get_pelt_model(make_reader("albert", num_hidden_layers=6), METHODS["unipelt"])
    assert one.get_nb_trainable_parameters() == six.get_nb_trainable_parameters()
    groups = make_reader("albert", num_hidden_layers=4, num_hidden_groups=2, inner_group_num=2)
    several = get_pelt_model(groups, METHODS["unipelt"])
    assert [state.number for state in several._injection.states] == [0, 1, 2, 3]


@torch.no_grad()
def test_modernberts_projections_are_matrices_of_their_own():
    found = matrices_of(make_reader("modernbert"))
    places = [(matrix.place, matrix.entries) for matrix in found if matrix.layer == 0]
    assert places == [
        ("query", 32 * 32), ("key", 32 * 32), ("value", 32 * 32), ("attention_output", 32 * 32),
        ("ffn_in", 48 * 32), ("ffn_in_2", 48 * 32), ("ffn_out", 32 * 48),
    ]  # fmt: skip


@pytest.mark.parametrize("family", OWN_ATTENTION)
@pytest.mark.parametrize("method", ["prefix", "unipelt", "mam"])
def test_an_attention_of_its_own_refuses_prefixes_and_says_what_it_can_have(method, family):
    base = make_reader(family)
    with pytest.raises(ValueError, match="further keys, got .*; leave the prefix out: adapters an"):
        get_pelt_model(base, METHODS[method])
    get_pelt_model(base, UniPELTConfig(prefix=None)).remove()


def test_deberta_with_shared_projections_refuses_their_gates_alone():
    def base():
        return make_reader("deberta-v2", share_att_key=True)

    with pytest.raises(ValueError, match=r"no gate at query of .*use targets=\('value',\)"):
        get_pelt_model(base(), UniPELTConfig(prefix=None))
    gated = UniPELTConfig(prefix=None, lora=LoraConfig(r=4, targets=("value",)))
    for config in (gated, METHODS["lora"], METHODS["pst"]):
        model = randomised(get_pelt_model(base(), config)).train()
        model.set_progress(0.0)
        loss_of(model, batch("deberta-v2")).backward()
    model = randomised(get_pelt_model(base(), METHODS["lora"])).eval()
    with torch.no_grad():
        expected = output(model, batch("deberta-v2"))
        found = output(model.export_dense(), batch("deberta-v2"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_model_without_biases_refuses_to_tune_them():
    with pytest.raises(ValueError, match="with biases, got ModernBertFor.*, whose layers have no"):
        get_pelt_model(make_reader("modernbert"), BitFitConfig())
