"""LoRA as PEFT's files have it: one branch for each module, by the module's name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from ...methods import LoraConfig, Parts
from ...nn import FusedLoRALinear, LoRALinear, LowRank
from ...nn.original import sizes_of
from ..lora_targets import fitting
from ..wrapped import BASE
from .names import shortest_ends, with_patterns

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Fields that are read here, or whose effect is in the tensors: which modules, and how they began.
LORA_FIELDS = (
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "bias",
    "lora_bias", "init_lora_weights", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "fan_in_fan_out", "runtime_config", "megatron_core", "qalora_group_size",
    "loftq_config", "eva_config",
)  # fmt: skip
# How branches may have begun. Others also change the base model's weights.
STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


class _Pair(NamedTuple):
    """A module's branch."""

    a: Tensor
    b: Tensor
    bias: Tensor | None

    @property
    def r(self) -> int:
        return len(self.a)


def read_lora(
    described: Mapping[str, Any], tensors: dict[str, Tensor], base: PreTrainedModel, where: str
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The config and the branches, which it takes out of the tensors.

    The modules are those that have tensors: how PEFT came to them (lists, a regular expression,
    layers) need not be found out again.
    """
    start = described.get("init_lora_weights")
    if start not in STARTS:
        raise ValueError(
            "from_pretrained: expected init_lora_weights that leave the base model's weights as "
            f"they are, got {start!r} in {where}; convert it with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...)"
        )
    pairs = _take_pairs(tensors, where)
    names = [name for name, _ in base.named_modules() if name in pairs]
    if len(names) < len(pairs) or not pairs:
        missing = next((name for name in pairs if name not in names), "none")
        raise ValueError(
            f"from_pretrained: expected LoRA for modules of {type(base).__name__}, got {missing} "
            f"in {where}; it was trained in another kind of model"
        )
    alphas, patterns = described.get("lora_alpha", 8), described.get("alpha_pattern") or {}
    by_name = {}
    for name in names:
        pattern = fitting(tuple(patterns.items()), name, "")
        by_name[name] = alphas if pattern is None else pattern[1]
    alpha, alpha_pattern = with_patterns(by_name)
    r, rank_pattern = with_patterns({name: pairs[name].r for name in names})
    config = LoraConfig(
        r=r,
        alpha=alpha,
        targets=shortest_ends(names, (name for name, _ in base.named_modules())),
        dropout=described.get("lora_dropout", 0.0),
        rank_pattern=rank_pattern,
        alpha_pattern=alpha_pattern,
        use_rslora=bool(described.get("use_rslora")),
        bias=_bias(described),
    )
    own: dict[str, Tensor] = {}
    for name in names:
        pair = pairs[name]
        own |= {f"{BASE}{name}.lora_a": pair.a, f"{BASE}{name}.lora_b": pair.b}
        if pair.bias is not None:
            scale = by_name[name] / (math.sqrt(pair.r) if config.use_rslora else pair.r)
            tensors[f"{name}.bias"] = _with_branch_bias(base, tensors, name, pair.bias * scale)
    return config, own


def written_lora(
    parts: Parts, model: PreTrainedModel, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's fields and tensors, without its prefix of their names, of the branches and biases.

    Args:
        model: the base model, whose branches these are.
        tensors: the branches' values, and all else that is saved, by the names of parameters.
    """
    assert parts.lora is not None
    pairs: dict[str, _Pair] = {}
    alphas: dict[str, float] = {}
    are_transposed = []
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear) and module.r:
            start = f"{BASE}{name}.lora_"
            pairs[name] = _Pair(tensors[f"{start}a"], tensors[f"{start}b"], None)
            alphas[name] = module.alpha
        elif isinstance(module, FusedLoRALinear) and len(module.branches):
            pairs[name], scale = _joined(name, module, tensors)
            alphas[name] = scale * pairs[name].r
        else:
            continue
        are_transposed.append(module.original.is_transposed)
    alpha, alpha_pattern = with_patterns({n: _whole(value) for n, value in alphas.items()})
    r, rank_pattern = with_patterns({name: pair.r for name, pair in pairs.items()})
    modules = [name for name, module in model.named_modules() if ".original" not in name]
    bias = "all" if parts.tune == "bias" else parts.lora.bias
    fields = {
        "r": r,
        "lora_alpha": alpha,
        "target_modules": list(shortest_ends(list(pairs), modules)),
        "lora_dropout": parts.lora.dropout,
        "rank_pattern": dict(rank_pattern),
        "alpha_pattern": dict(alpha_pattern),
        "use_rslora": False,
        "bias": bias,
        "fan_in_fan_out": all(are_transposed),
        "init_lora_weights": True,
    }
    written: dict[str, Tensor] = {}
    for name, pair in pairs.items():
        written |= {f"{name}.lora_A.weight": pair.a, f"{name}.lora_B.weight": pair.b}
    for key, tensor in tensors.items():
        name, _, last = key.removeprefix(BASE).rpartition(".")
        if last == "bias" and bias != "none":
            written[f"{name}.base_layer.bias" if name in pairs else f"{name}.bias"] = tensor
    return fields, written


def _joined(
    name: str, module: FusedLoRALinear, tensors: Mapping[str, Tensor]
) -> tuple[_Pair, float]:
    """The branches of one Linear's projections as one branch into all of its columns, which is the
    sum of theirs, and its scale.
    """
    rows, columns, scales = [], [], []
    _, out = sizes_of(module.original.module)
    for projection, member in module.branches.items():
        start = f"{BASE}{name}.branches.{projection}.lora_"
        b = tensors[f"{start}b"].detach()
        whole = b.new_zeros(out, b.shape[1])
        offset = module.offsets[projection]
        whole[offset : offset + len(b)] = b
        rows.append(tensors[f"{start}a"].detach())
        columns.append(whole)
        scales.append(cast(LowRank, member).scale)
    columns = [whole * (scale / scales[0]) for whole, scale in zip(columns, scales, strict=True)]
    return _Pair(torch.cat(rows), torch.cat(columns, 1), None), scales[0]


def _whole(value: float) -> float:
    """A number without the point where it is a whole one, as readers of alpha expect it."""
    return int(value) if value == int(value) else value


def _bias(described: Mapping[str, Any]) -> str:
    """Which biases are trained: a branch's own is that of its Linear, to which it is added."""
    bias: str = described.get("bias", "none")
    return "lora_only" if bias == "none" and described.get("lora_bias") else bias


def _with_branch_bias(
    base: PreTrainedModel, tensors: dict[str, Tensor], name: str, added: Tensor
) -> Tensor:
    """The bias of a Linear with its branch's."""
    linear: Any = base.get_submodule(name)
    if getattr(linear, "bias", None) is None:
        raise ValueError(
            "from_pretrained: expected lora_bias for Linears with a bias, to which it is added, "
            f"got {name} without"
        )
    own = tensors.pop(f"{name}.base_layer.bias", linear.bias.detach().cpu())
    return own.to(torch.float64).add(added.to(torch.float64)).to(own.dtype)


def _take_pairs(tensors: dict[str, Tensor], where: str) -> dict[str, _Pair]:
    """The branches by the names of their modules."""
    halves: dict[str, dict[str, Tensor]] = {}
    for key in [key for key in tensors if ".lora_" in key]:
        name, _, half = key.partition(".lora_")
        if half not in ("A.weight", "B.weight", "B.bias"):
            raise ValueError(
                "from_pretrained: expected LoRA of Linears, with lora_A and lora_B, got "
                f"{key} in {where}"
            )
        halves.setdefault(name, {})[half] = tensors.pop(key)
    pairs = {}
    for name, found in halves.items():
        a, b = found.get("A.weight"), found.get("B.weight")
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
            shapes = [None if half is None else list(half.shape) for half in (a, b)]
            raise ValueError(
                f"from_pretrained: expected lora_A [r, in] and lora_B [out, r] of {name}, got "
                f"{shapes[0]} and {shapes[1]} in {where}"
            )
        pairs[name] = _Pair(a, b, found.get("B.bias"))
    return pairs
