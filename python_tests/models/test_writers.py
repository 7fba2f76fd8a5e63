"""Models that write text, with every method that is defined for them."""

from __future__ import annotations

import pytest
import torch
from families import PAD, WORDS, WRITERS, make_writer

from pelt_kernels import (
    AdaMixConfig,
    BottleneckAdapterConfig,
    CompositeConfig,
    FullConfig,
    HyperPELTConfig,
    LoraConfig,
    PrefixTuningConfig,
    UniPELTConfig,
    VLMConfig,
    get_pelt_model,
)
from pelt_kernels.models import PeltModel

PREFIX = PrefixTuningConfig(prefix_length=3, mid=8)
ADAPTER = BottleneckAdapterConfig(bottleneck=4)
METHODS = {
    "adamix-adapter": AdaMixConfig(bottleneck=4, consistency=0.0),
    "adamix-lora": AdaMixConfig(kind="lora", consistency=0.0),
    "adapter": ADAPTER,
    "full": FullConfig(),
    "hyperpelt": HyperPELTConfig(bottleneck=4, prefix_length=3),
    "lora": LoraConfig(r=4),
    "lora-all": LoraConfig(
        r=2, targets=("query", "key", "value", "attention_output", "ffn_in", "ffn_out")
    ),
    "mam": CompositeConfig.mam(prefix=PREFIX),
    "parallel": BottleneckAdapterConfig(bottleneck=4, placement="parallel", gated=True),
    "prefix": PREFIX,
    "vlm": VLMConfig(bottlenecks=(4,)),
    "unipelt": UniPELTConfig(adapter=ADAPTER, prefix=PREFIX, lora=LoraConfig(r=4)),
}
ENCODER_DECODERS = ("bart", "mbart", "mt5", "t5")
SEARCHES = {"greedy": {}, "beam": {"num_beams": 3}}


def randomised(model: PeltModel, std: float = 0.2) -> PeltModel:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.trained_parameters().values():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return model


def batch(family: str) -> dict[str, torch.Tensor]:
    """Three texts of 9, 4 and 7 words, padded behind, and what is to be written."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, WORDS, (3, 9), generator=generator)
    mask = torch.arange(9)[None] < torch.tensor([9, 4, 7])[:, None]
    ids = torch.where(mask, ids, PAD)
    labels = torch.where(mask, ids, -100)
    if family in ENCODER_DECODERS:
        labels = labels[:, :6].flip(0)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def write(model, ids, mask, search: str = "greedy", **options):
    with torch.no_grad():
        return model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False,
            eos_token_id=None, **SEARCHES[search], **options,
        )  # fmt: skip


def prompts(family: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts, of a decoder padded in front and of an encoder behind."""
    ids = torch.tensor([[PAD, PAD, 7, 8, 9], [11, 12, 13, 14, 15]])
    if family in ENCODER_DECODERS:
        ids = torch.tensor([[7, 8, 9, PAD, PAD], [11, 12, 13, 14, 15]])
    return ids, (ids != PAD).long()


@pytest.mark.parametrize("family", WRITERS)
@pytest.mark.parametrize("method", METHODS)
def test_training_saving_and_going_back(method, family, tmp_path):
    """A step lowers the loss, files hold what is trained, and the base comes back as it was."""
    base = make_writer(family)
    first = {name: value.clone() for name, value in base.state_dict().items()}
    inputs = batch(family)
    with torch.no_grad():
        untouched = base(**inputs).logits
    model = randomised(get_pelt_model(base, METHODS[method]), std=0.05).train()
    torch.manual_seed(0)
    loss = model(**inputs).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    with torch.no_grad():
        for parameter in model.trained_parameters().values():
            parameter.sub_(0.02 * parameter.grad / (parameter.grad.norm() + 1e-12))
    torch.manual_seed(0)
    assert model(**inputs).loss < loss
    model.eval()
    with torch.no_grad():
        logits = model(**inputs).logits
    assert (logits - untouched).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    again = PeltModel.from_pretrained(make_writer(family), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, logits)
    if method == "full":
        return
    back = model.remove()
    assert back is base and not isinstance(back, PeltModel)
    for name, value in back.state_dict().items():
        assert torch.equal(value, first[name]), name
    with torch.no_grad():
        assert torch.equal(back(**inputs).logits, untouched)


@pytest.mark.parametrize("family", WRITERS)
@pytest.mark.parametrize("method", ["prefix", "unipelt", "parallel"])
@pytest.mark.parametrize("search", SEARCHES)
def test_the_same_words_with_a_cache_without_and_one_by_one(search, method, family):
    model = randomised(get_pelt_model(make_writer(family), METHODS[method])).eval()
    ids, mask = prompts(family)
    written = write(model, ids, mask, search)
    assert torch.equal(write(model, ids, mask, search, use_cache=False), written)
    start = 0 if family in ENCODER_DECODERS else ids.shape[1]
    for row in range(len(ids)):
        seen = mask[row].bool()
        alone = write(model, ids[row : row + 1, seen], mask[row : row + 1, seen], search)
        begin = 0 if start == 0 else int(seen.sum())
        assert torch.equal(alone[0, begin:], written[row, start:]), row


@pytest.mark.parametrize("family", WRITERS)
def test_a_cache_of_fixed_size(family):
    model = randomised(get_pelt_model(make_writer(family), METHODS["unipelt"])).eval()
    ids, mask = prompts(family)
    written = write(model, ids, mask)
    assert torch.equal(write(model, ids, mask, cache_implementation="static"), written)


@pytest.mark.parametrize("family", WRITERS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_without_a_prefix_is_the_base_models(family, attention):
    """With prefixes of length 0, in all layers and in the first alone."""
    inputs = batch(family)
    read = inputs["labels"] != -100  # a padding row in a window sees nothing
    with torch.no_grad():
        expected = make_writer(family, attention)(**inputs).logits
        empty = PrefixTuningConfig(prefix_length=0, mid=None)
        layers = range(4 if family in ENCODER_DECODERS else 2)
        some = PrefixTuningConfig(prefix_length=0, mid=None, skip_layers=tuple(layers)[1:])
        for config in (empty, some):
            model = get_pelt_model(make_writer(family, attention), config)
            logits = model(**inputs).logits
            torch.testing.assert_close(logits[read], expected[read], rtol=1e-4, atol=2e-5)
