"""Text written word by word, with a key/value cache: the prefix is in no cache, and seen at each
step.
"""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from pelt_kernels import (
    LoraConfig,
    PrefixTuningConfig,
    UniPELTConfig,
    get_pelt_model,
    use_backend,
)
from pelt_kernels.ops import _native as native

SIZES = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 60, "pad_token_id": 1,
}  # fmt: skip
METHODS = {
    "prefix": PrefixTuningConfig(prefix_length=5, mid=8),
    "skipped": PrefixTuningConfig(prefix_length=5, mid=8, skip_layers=(1,)),
    "all": UniPELTConfig.apl(gated=False),
    "gated": UniPELTConfig.apl(),
}
SEARCHES = {"greedy": {}, "beam": {"num_beams": 3}}


def make(method, family="Bert", attention="sdpa", **changes):
    torch.manual_seed(0)
    config = getattr(hf, f"{family}Config")(
        **SIZES | changes, is_decoder=True, attn_implementation=attention
    )
    head = "BertLMHeadModel" if family == "Bert" else f"{family}ForCausalLM"
    model = get_pelt_model(getattr(hf, head)(config).eval(), METHODS[method])
    with torch.no_grad():  # what is added starts as nothing or small
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def write(model, search, **options):
    prompts = torch.tensor([[1, 1, 7, 8, 9], [11, 12, 13, 14, 15]])  # the first is padded in front
    with torch.no_grad():
        return model.generate(
            input_ids=prompts, attention_mask=(prompts != 1).long(), max_new_tokens=12,
            do_sample=False, eos_token_id=None, **SEARCHES[search], **options,
        )  # fmt: skip


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("method", METHODS)
def test_the_same_words_with_and_without_a_cache_and_on_every_backend(method, search, family, need):
    model = make(method, family)
    with use_backend("eager"):
        words = write(model, search, use_cache=False)
        assert torch.equal(words, write(model, search, use_cache=True))
    need("cpu", native.why_not("_C"))
    assert torch.equal(words, write(model, search, use_cache=True))


def test_the_prefix_matters_and_is_in_no_cache():
    model = make("prefix")
    ids = torch.tensor([[7, 8, 9, 10]])
    with torch.no_grad():
        first = model(input_ids=ids[:, :3], use_cache=True)
        assert first.past_key_values.get_seq_length() == 3
        step = model(input_ids=ids[:, 3:], past_key_values=first.past_key_values).logits[:, -1]
        whole = model(input_ids=ids).logits[:, -1]
        with model.disable_adapter():
            without = model(input_ids=ids).logits[:, -1]
    torch.testing.assert_close(step, whole)
    assert (whole - without).abs().max() > 1e-3


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_word_does_not_see_what_follows(attention):
    model = make("skipped", attention=attention)
    ids = torch.tensor([[7, 8, 9, 10, 11]])
    changed = torch.tensor([[7, 8, 9, 20, 21]])
    with torch.no_grad():
        before, after = (model(input_ids=i).logits for i in (ids, changed))
    torch.testing.assert_close(before[:, :3], after[:, :3])
    assert (before[:, 3] - after[:, 3]).abs().max() > 1e-3


def test_what_a_decoder_refuses():
    def base(**changes):
        return hf.BertLMHeadModel(hf.BertConfig(**SIZES, is_decoder=True, **changes))

    with pytest.raises(ValueError, match="add_cross_attention=True"):
        get_pelt_model(base(add_cross_attention=True), LoraConfig())
