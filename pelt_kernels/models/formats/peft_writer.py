"""LoRA and prefixes written as PEFT would: for `peft.PeftModel` and for servers that read its
files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from ...methods import MethodConfig, Parts, parts_of
from ..adapter_files import CONFIG_FILE, FORMER_CONFIG_FILE, FORMER_WEIGHTS_FILE, check_finite
from ..first_values import head_names
from ..tensor_files import write_atomically
from ..vocabulary import ADDED_ROWS
from ..wrapped import BASE
from .peft_lora import written_lora
from .peft_prefix import OWN_NAME, why_not_written, written_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# By what a model's class is named, which of PEFT's classes serves it.
TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def write_peft(
    directory: str | os.PathLike[str],
    model: PreTrainedModel,
    config: MethodConfig,
    tensors: Mapping[str, Tensor],
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, from which
    ``peft.PeftModel.from_pretrained`` makes a model with the same outputs.

    Args:
        model: the base model, with the method in it.
        tensors: what is saved of it, by its name, the prefix collapsed.

    Raises:
        ValueError: a part that PEFT's files cannot hold, a folder with an adapter of this package,
            or a tensor that is not finite; nothing is written.
    """
    parts = parts_of(config)
    reason = _why_not(parts, model, tensors)
    if reason:
        raise ValueError(
            "save_pretrained: expected LoRA or a prefix as PEFT has them for format='peft', got "
            f"{reason}; format='pelt' writes every method"
        )
    target = Path(directory)
    if (target / CONFIG_FILE).exists():
        raise ValueError(
            f"save_pretrained: expected a folder without {CONFIG_FILE} for format='peft', got "
            f"{target}, where two adapters would stand; name another folder"
        )
    check_finite(tensors)
    if parts.lora is not None:
        kind, prefix = "LORA", "base_model.model."
        fields, written = written_lora(parts, model, tensors)
    else:
        assert parts.prefix is not None
        kind, prefix = "PREFIX_TUNING", "base_model."
        fields, written = written_prefix(parts.prefix, tensors, model)
    heads = {name.removeprefix(BASE): tensors[name] for name in _heads(model, tensors)}
    described = _common(kind, model, _modules_of(heads, model)) | fields
    is_prompt = kind == "PREFIX_TUNING"
    named = {name if is_prompt else prefix + name: tensor for name, tensor in written.items()}
    named |= {prefix + name: tensor for name, tensor in heads.items()}
    weights = {name: tensor.detach().contiguous().cpu() for name, tensor in named.items()}
    target.mkdir(parents=True, exist_ok=True)
    content = safetensors_bytes(weights, metadata={"format": "pt"})
    write_atomically(target / FORMER_WEIGHTS_FILE, content)
    text = json.dumps(described, indent=2, sort_keys=True)
    write_atomically(target / FORMER_CONFIG_FILE, text.encode() + b"\n")


def _why_not(parts: Parts, model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> str:
    """What PEFT's files cannot hold, or nothing."""
    others = {
        "an adapter": parts.adapter,
        "AdaMix's experts": parts.mixture,
        "PST's pruning": parts.pruning,
        "adapters of tasks": parts.vlm,
        "what HyperPELT's networks write": parts.hyper,
        "norms that are trained": parts.tune_norms,
        "a model that is trained as a whole": parts.tune == "all",
        "trainable_tokens": parts.trainable_tokens,
        "words that were added to the base model's": ADDED_ROWS in tensors,
    }
    found = [name for name, is_there in others.items() if is_there]
    if parts.lora is not None and parts.lora.gated:
        found.append("LoRA with gates")
    if parts.lora is not None and parts.prefix is not None:
        found.append("LoRA and a prefix in one")
    if parts.prefix is not None:
        found.append(why_not_written(parts.prefix, model))
        found += ["biases beside a prefix"] if parts.tune == "bias" else []
    if parts.lora is None and parts.prefix is None:
        found.append("neither")
    return " and ".join(reason for reason in found if reason)


def _heads(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> list[str]:
    """The head's parameters among the tensors."""
    head = head_names(model)
    return [name for name in tensors if name.removeprefix(BASE) in head and name != OWN_NAME]


def _modules_of(heads: Collection[str], model: PreTrainedModel) -> list[str] | None:
    """The modules that hold these parameters and no others, as PEFT's modules_to_save.

    PEFT takes every module whose name ends with one of them.
    """
    if not heads:
        return None
    modules = list(dict.fromkeys(name.partition(".")[0] for name in heads))
    held = [n for n, _ in model.named_parameters() if n.partition(".")[0] in modules]
    taken = [
        name
        for name, _ in model.named_modules()
        if name.endswith(tuple(modules)) and name.partition(".")[0] not in modules
    ]
    others = [*(name for name in held if name not in heads), *taken]
    if others or any("." not in name for name in heads):
        raise ValueError(
            "save_pretrained: expected a head of modules of its own for format='peft', got "
            f"{', '.join(modules)} of {type(model).__name__}"
            f"{f' with {others[0]}, which is not trained' if others else ''}; format='pelt' "
            "writes it"
        )
    return modules


def _common(kind: str, model: PreTrainedModel, modules: list[str] | None) -> dict[str, Any]:
    """The fields of every PEFT config."""
    name = type(model).__name__
    task = next((task for end, task in TASKS.items() if name.endswith(end)), None)
    base = {"base_model_class": name, "parent_library": type(model).__module__}
    return {
        "auto_mapping": base if task is None else None,
        "base_model_name_or_path": getattr(model.config, "_name_or_path", "") or None,
        "inference_mode": True,
        "modules_to_save": modules,
        "peft_type": kind,
        "revision": None,
        "task_type": task,
    }
