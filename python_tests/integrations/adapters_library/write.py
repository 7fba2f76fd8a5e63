"""Writes the checkpoints in this folder, with the library ``adapters``, and what it computes with
them. Run once, with adapters 1.3.0, transformers 4.57.6 and torch 2.13.0:

    python python_tests/integrations/adapters_library/write.py

bases/ holds tiny models; a folder beside it one adapter, with the base it belongs to, and
expected.safetensors the logits of each, and what the models were given. Every parameter is drawn at
random, so that nothing is 0 as at the start of a training.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from adapters import (
    DoubleSeqBnConfig,
    LoRAConfig,
    MAMConfig,
    ParBnConfig,
    PrefixTuningConfig,
    SeqBnConfig,
    UniPELTConfig,
)
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
LABELS = 3
SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 14,
    "num_labels": LABELS,
}
DISTILBERT_SIZES = {
    "vocab_size": 32,
    "dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 24,
    "max_position_embeddings": 14,
    "num_labels": LABELS,
}
BASES = {
    "bert": (transformers.BertConfig, "BertForSequenceClassification", SIZES),
    "roberta": (transformers.RobertaConfig, "RobertaForSequenceClassification", SIZES),
    "electra": (
        transformers.ElectraConfig,
        "ElectraForSequenceClassification",
        SIZES | {"embedding_size": 16},
    ),
    "distilbert": (
        transformers.DistilBertConfig,
        "DistilBertForSequenceClassification",
        DISTILBERT_SIZES,
    ),
}
IDS = torch.tensor([[3, 7, 11, 19, 23, 5, 2, 9], [4, 8, 15, 16, 2, 1, 1, 1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0, 0]])

_UNIPELT = UniPELTConfig(
    PrefixTuningConfig(prefix_length=3, bottleneck_size=4, use_gating=True),
    SeqBnConfig(reduction_factor=4, use_gating=True),
    LoRAConfig(r=2, alpha=2, use_gating=True),
)
_LORA = LoRAConfig(
    r=2, alpha=6, attn_matrices=["q", "k"], intermediate_lora=True, output_lora=True, leave_out=[0]
)
_PREFIX = PrefixTuningConfig(prefix_length=3, bottleneck_size=4)
# name: base, config, whether in safetensors (which a prefix cannot be written in)
WRITTEN: dict[str, tuple[str, Any, bool]] = {
    "seq_bn": ("bert", SeqBnConfig(reduction_factor=4, non_linearity="gelu", dropout=0.1), True),
    "double_seq_bn": ("bert", DoubleSeqBnConfig(reduction_factor=4), True),
    "par_bn": ("bert", ParBnConfig(reduction_factor=4), False),
    "lora": ("bert", _LORA, True),
    "prefix": ("bert", _PREFIX, False),
    "prefix_flat": ("bert", PrefixTuningConfig(prefix_length=3, flat=True, leave_out=[1]), False),
    "prefix_ejected": ("bert", _PREFIX, False),
    "unipelt": ("bert", _UNIPELT, False),
    "mam": ("bert", MAMConfig(_PREFIX, ParBnConfig(reduction_factor=4)), False),
    "unipelt_distilbert": ("distilbert", _UNIPELT, False),
    "unipelt_roberta": ("roberta", _UNIPELT, False),
    # With heads of the library's own classes.
    "flexible_bert": ("bert", SeqBnConfig(reduction_factor=4), True),
    "flexible_roberta": ("roberta", LoRAConfig(r=2, use_gating=True), True),
    "flexible_electra": ("electra", SeqBnConfig(reduction_factor=4), True),
    "flexible_distilbert": ("distilbert", ParBnConfig(reduction_factor=4), True),
}
FLEXIBLE_HEADS: dict[str, dict[str, Any]] = {
    "bert": {"layers": 1, "use_pooler": True},
    "roberta": {"layers": 2, "activation_function": "tanh"},
    "electra": {"layers": 2, "activation_function": "gelu"},
    "distilbert": {"layers": 2, "activation_function": "relu"},
}


@torch.no_grad()
def draw(parameters: Any) -> None:
    """Gives each parameter numbers of a size at which it counts."""
    for name, parameter in parameters:
        around = 1.0 if "norm.weight" in name.lower() else 0.0
        parameter.copy_(around + 0.3 * torch.randn_like(parameter))


def write_base(name: str) -> None:
    config, kind, sizes = BASES[name]
    model = getattr(transformers, kind)(config(**sizes))
    draw(model.named_parameters())
    model.save_pretrained(HERE / "bases" / name)


def write_adapter(name: str, base: str, config: Any, is_safe: bool) -> torch.Tensor:
    """Writes an adapter with a head of its own; the logits that the library has with it."""
    folder = Path("bases", base)  # in HERE: the library writes this name into the adapter's files
    if name.startswith("flexible"):
        model = adapters.AutoAdapterModel.from_pretrained(folder)
        model.add_classification_head(name, num_labels=LABELS, **FLEXIBLE_HEADS[base])
    else:
        # In DistilBERT with SDPA the library adds 1 to the scores of prefixes beside a mask.
        kind = getattr(transformers, BASES[base][1])
        model = kind.from_pretrained(folder, attn_implementation="eager")
        adapters.init(model)
    model.add_adapter(name, config=config)
    model.train_adapter(name)
    draw((n, p) for n, p in model.named_parameters() if p.requires_grad)
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=IDS, attention_mask=MASK).logits
    if name == "prefix_ejected":
        model.eject_prefix_tuning(name)
    model.save_adapter(str(HERE / name), name, use_safetensors=is_safe)
    return logits.contiguous()


def main() -> None:
    torch.manual_seed(7)
    os.chdir(HERE)
    shutil.rmtree(HERE / "bases", ignore_errors=True)
    for name in BASES:
        write_base(name)
    expected = {"input_ids": IDS, "attention_mask": MASK}
    for name, (base, config, is_safe) in WRITTEN.items():
        shutil.rmtree(HERE / name, ignore_errors=True)
        expected[name] = write_adapter(name, base, config, is_safe)
    save_file(expected, HERE / "expected.safetensors")


if __name__ == "__main__":
    main()
