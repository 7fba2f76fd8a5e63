"""Small random models and tokenizers under the names that PEFT's tests load from the Hugging Face
hub, in a folder that transformers, PEFT and diffusers read as their cache, so that those tests run
with their own loading code and without a network.

    python -m benchmarks.peers.peft_models FOLDER

Sizes follow what the tests say of a model, such as a name of a module or a number of layers. The
weights are random, and large enough that an adapter changes what such a small model says.
A Llama pads with 0, as the tests write with 1 and 2 and a padding has no embedding.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

REVISION = "0" * 40  # a commit's name, which a snapshot needs
WIDTH = 16


class Made(NamedTuple):
    """A model of the hub: transformers' class, its config's values, whether it has a tokenizer."""

    kind: str
    values: dict[str, Any]
    has_tokenizer: bool = True


OPT = {
    "vocab_size": 1024, "hidden_size": WIDTH, "ffn_dim": 32, "num_hidden_layers": 5,
    "num_attention_heads": 4, "max_position_embeddings": 256, "word_embed_proj_dim": WIDTH,
    "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2, "init_std": 0.2,
}  # fmt: skip
OPT_125M = OPT | {"num_hidden_layers": 12, "hidden_size": 64, "word_embed_proj_dim": 64}
GPT2 = {
    "vocab_size": 1024, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 512,
    "bos_token_id": 2, "eos_token_id": 2,
}  # fmt: skip
LLAMA = {
    "vocab_size": 1024, "hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512,
    "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
GROUPED = LLAMA | {"num_key_value_heads": 2}
GEMMA = GROUPED | {"hidden_size": 32, "head_dim": 8}
BERT = {
    "vocab_size": 1124, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 5,
    "num_attention_heads": 4, "max_position_embeddings": 512, "pad_token_id": 0,
}  # fmt: skip
ROBERTA = BERT | {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
DEBERTA = BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "hidden_act": "gelu"}
T5 = {
    "vocab_size": 1103, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 5, "num_heads": 4,
    "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "initializer_factor": 3.0,
}  # fmt: skip
BART = {
    "vocab_size": 1024, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 4,
    "decoder_ffn_dim": 4, "max_position_embeddings": 100, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 2, "init_std": 0.2,
}  # fmt: skip
CLIP_TEXT = {
    "vocab_size": 1024, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 5,
    "num_attention_heads": 4, "max_position_embeddings": 77, "projection_dim": 32,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
BLOOM = {"vocab_size": 1024, "hidden_size": 32, "n_layer": 5, "n_head": 4}
NEOX = LLAMA | {"hidden_size": 32, "num_hidden_layers": 5, "intermediate_size": 37}
FALCON_MAMBA = {
    "vocab_size": 1024, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8,
    "conv_kernel": 4, "intermediate_size": 64, "time_step_rank": 2,
}  # fmt: skip
NEMOTRON = {
    "vocab_size": 1024, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "mamba_num_heads": 4,
    "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "hybrid_override_pattern": "M*-",
}  # fmt: skip

MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": Made("OPTForCausalLM", OPT),
    "peft-internal-testing/opt-125m": Made("OPTForCausalLM", OPT_125M),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": Made("GPT2LMHeadModel", GPT2),
    "peft-internal-testing/tiny-random-gpt2": Made("GPT2LMHeadModel", GPT2),
    "hf-internal-testing/tiny-random-gpt2": Made("GPT2LMHeadModel", GPT2),
    "gpt2": Made("GPT2LMHeadModel", GPT2),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": Made(
        "GPTJForCausalLM", GPT2 | {"rotary_dim": 4}
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": Made("LlamaForCausalLM", LLAMA),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": Made("LlamaForCausalLM", LLAMA),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": Made("LlamaForCausalLM", LLAMA),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": Made(
        "LlamaForSequenceClassification", GROUPED
    ),
    "peft-internal-testing/tiny-dummy-qwen2": Made("Qwen2ForCausalLM", GROUPED),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": Made("Qwen3ForCausalLM", GEMMA),
    "hf-internal-testing/tiny-random-MistralForCausalLM": Made("MistralForCausalLM", GROUPED),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": Made("Gemma3ForCausalLM", GEMMA),
    "peft-internal-testing/tiny-random-BloomForCausalLM": Made("BloomForCausalLM", BLOOM),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": Made("GPTNeoXForCausalLM", NEOX),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": Made(
        "T5ForConditionalGeneration", T5
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": Made(
        "T5ForConditionalGeneration", T5
    ),
    "peft-internal-testing/tiny-random-t5": Made("T5ForConditionalGeneration", T5),
    "google/flan-t5-small": Made("T5ForConditionalGeneration", T5),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": Made(
        "BartForConditionalGeneration", BART
    ),
    "peft-internal-testing/tiny-random-BertModel": Made("BertModel", BERT),
    "hf-internal-testing/tiny-random-BertModel": Made("BertModel", BERT),
    "bert-base-uncased": Made("BertModel", BERT),
    "peft-internal-testing/tiny-random-RobertaModel": Made("RobertaModel", ROBERTA),
    "peft-internal-testing/tiny-random-DebertaModel": Made("DebertaModel", DEBERTA),
    "peft-internal-testing/tiny-random-DebertaV2Model": Made("DebertaV2Model", DEBERTA),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": Made(
        "BertForSequenceClassification", BERT
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": Made(
        "RobertaForSequenceClassification", ROBERTA
    ),
    "peft-internal-testing/tiny-clip-text-2": Made("CLIPTextModel", CLIP_TEXT, False),
    "trl-internal-testing/tiny-NemotronHForCausalLM-nano": Made("NemotronHForCausalLM", NEMOTRON),
    "tiiuae/falcon-mamba-tiny-dev": Made("FalconMambaForCausalLM", FALCON_MAMBA),
}

# Adapters: the base model, and the values of PEFT's LoraConfig.
ADAPTERS = {
    "peft-internal-testing/tiny-OPTForCausalLM-lora": (
        "peft-internal-testing/tiny-random-OPTForCausalLM", {"task_type": "CAUSAL_LM"}
    ),
    "peft-internal-testing/gpt2-lora-random": (
        "peft-internal-testing/tiny-random-gpt2", {"task_type": "CAUSAL_LM"}
    ),
}  # fmt: skip


def make(folder: Path) -> None:
    """Every model, adapter and pipeline into a cache; what is there already stays."""
    import torch

    torch.manual_seed(0)
    for name, made in MODELS.items():
        _once(folder, name, lambda place, made=made: _make_model(place, made))
    for name, (base, values) in ADAPTERS.items():
        source = snapshot(folder, base)
        _once(
            folder,
            name,
            lambda place, source=source, base=base, values=values: _make_adapter(
                place, source, base, values
            ),
        )
    _once(folder, "hf-internal-testing/tiny-sd-pipe", _make_pipeline)


def snapshot(folder: Path, name: str) -> Path:
    """Where the cache keeps a model of the hub."""
    return folder / f"models--{name.replace('/', '--')}" / "snapshots" / REVISION


def _once(folder: Path, name: str, write: Callable[[Path], None]) -> None:
    place = snapshot(folder, name)
    main = place.parents[1] / "refs" / "main"
    if main.is_file():
        return
    place.mkdir(parents=True, exist_ok=True)
    write(place)
    main.parent.mkdir(exist_ok=True)
    main.write_text(REVISION)  # last, so that half a model is none


def _make_model(place: Path, made: Made) -> None:
    import transformers

    kind = getattr(transformers, made.kind)
    kind(kind.config_class(**made.values)).save_pretrained(place)
    if made.has_tokenizer:
        _tokenizer().save_pretrained(place)


def _make_adapter(place: Path, source: Path, base: str, values: dict[str, Any]) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    config = peft.LoraConfig(init_lora_weights=False, **values)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(source), config)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(place)


def _make_pipeline(place: Path) -> None:
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel

    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=2, sample_size=32, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64), latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    diffusers.StableDiffusionPipeline(
        vae=vae, unet=unet, text_encoder=CLIPTextModel(CLIPTextConfig(**CLIP_TEXT)),
        tokenizer=_tokenizer(), scheduler=diffusers.DDIMScheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(place)  # fmt: skip


def _tokenizer() -> Any:
    """Bytes as tokens, behind four special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: index for index, word in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.BPE(words, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>",
        unk_token="<unk>", model_max_length=77,
    )  # fmt: skip


if __name__ == "__main__":
    make(Path(sys.argv[1]))
