"""The configs of the library ``adapters`` as this project's methods.

What stands where (f: the FFN's output, a: its residual, u: the adapter, h: what a layer reads):

    seq_bn           LN( g·s·u(LN(f + a)) + f + a )     adapter, sequential
    par_bn           LN( g·s·u(a) + f + a )             adapter, parallel
    lora             s = alpha / r, or g in its place   the same
    prefix_tuning    [g·Pk ; K], [g·Pv ; V]             the same
    union            its parts side by side             UniPELT with a gate anywhere, else composite

Every gate is the mean over all tokens, padding included: ``gate_pooling="mean"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ...methods import (
    BottleneckAdapterConfig,
    CompositeConfig,
    LoraConfig,
    MethodConfig,
    PrefixTuningConfig,
    UniPELTConfig,
)

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
    "linear": "identity",
}
# Files without a version are of a library in which the same names meant others.
OLD_NAMES = {"gelu": "gelu_new", "gelu_orig": "gelu"}
TARGETS = {"q": "query", "k": "key", "v": "value"}
START_OF_UP = {"bert": "normal", "houlsby": "normal", "mam_adapter": "lora"}
ANY = object()  # a field that changes nothing of what is read

# The fields of each config, with the one value that has a counterpart here (ANY: it has no effect
# on what was trained), or, for those that are translated, the value where a file leaves it out.
BOTTLENECK_ONLY: dict[str, Any] = {
    "mh_adapter": False,
    "output_adapter": True,
    "leave_out": [],
    "ln_before": False,
    "ln_after": False,
    "original_ln_after": True,
    "inv_adapter": None,
    "phm_layer": False,
    "stochastic_depth": 0.0,
}
SEQUENTIAL_ONLY = {"original_ln_before": True, "residual_before_ln": True}
BOTTLENECK_READ: dict[str, Any] = {
    "non_linearity": None,
    "reduction_factor": None,
    "is_parallel": False,
    "scaling": 1.0,
    "use_gating": False,
    "dropout": 0.0,
    "init_weights": "bert",
}
# The last of these only order a sum, or count where there is a norm, a hypercomplex layer, an
# invertible adapter or an attention over an encoder.
BOTTLENECK_IDLE = (
    *("init_weights_seed", "adapter_residual_before_ln", "inv_adapter_reduction_factor"),
    *("cross_adapter", "phm_dim", "phm_bias", "phm_c_init", "phm_init_range", "phm_rank"),
    *("factorized_phm_W", "factorized_phm_rule", "shared_W_phm", "shared_phm_rule"),
    *("learn_phm", "hypercomplex_nonlinearity"),
)
PREFIX_ONLY: dict[str, Any] = {"dropout": 0.0, "shared_gating": True}
PREFIX_READ: dict[str, Any] = {
    "leave_out": [],
    "flat": False,
    "prefix_length": None,
    "bottleneck_size": 512,
    "non_linearity": "tanh",
    "use_gating": False,
}
PREFIX_IDLE = ("encoder_prefix", "cross_prefix", "init_weights_seed")
LORA_ONLY: dict[str, Any] = {
    "composition_mode": "add",
    "use_dora": False,
    "vera_d": None,
    "vera_b": None,
}
LORA_READ: dict[str, Any] = {
    "selfattn_lora": True,
    "intermediate_lora": False,
    "output_lora": False,
    "leave_out": [],
    "r": None,
    "alpha": None,
    "dropout": 0.0,
    "attn_matrices": ["q", "v"],
    "use_gating": False,
}
LORA_IDLE = ("init_weights", "init_weights_seed", "dtype")


class Parts(NamedTuple):
    """The parts of a config, each at most once."""

    adapter: BottleneckAdapterConfig | None = None
    prefix: PrefixTuningConfig | None = None
    lora: LoraConfig | None = None


def parts_of_config(described: dict[str, Any], base: Any, where: Path) -> Parts:
    """What an adapter_config.json describes, for a base model of that configuration.

    Raises:
        ValueError: a field whose value has no counterpart here, with its name.
    """
    config = described["config"]
    if not isinstance(config, Mapping):
        _refuse("config", "the fields themselves", config, where)
    is_union = config.get("architecture") == "union"
    members = config.get("configs") if is_union else [config]
    are_configs = isinstance(members, list) and all(isinstance(each, Mapping) for each in members)
    if not are_configs or not members:
        _refuse("configs", "a list of configs", members, where)
    if is_union and config.keys() - {"architecture", "configs"}:
        _refuse("config", "architecture and configs", sorted(config), where)
    found: dict[str, Any] = {}
    for member in members:
        architecture = member.get("architecture")
        if architecture not in READERS:
            words = "one of prefix_tuning, lora, union and null (a bottleneck)"
            _refuse("architecture", words, architecture, where)
        name, read = READERS[architecture]
        if name in found:
            _refuse("configs", f"one config of each kind, once {name}", "two of them", where)
        try:
            found[name] = read(_Fields(member, described, where), base)
        except (TypeError, ValueError) as error:
            if str(error).startswith("from_pretrained"):
                raise
            raise ValueError(f"from_pretrained: {error} (config in {where})") from error
    return Parts(**found)


def method_of(parts: Parts) -> MethodConfig:
    """The method that has just these parts."""
    given = {name: part for name, part in parts._asdict().items() if part is not None}
    if len(given) == 1:
        (part,) = given.values()
        return part
    if any(part.gated for part in given.values()):
        return UniPELTConfig(**parts._asdict(), gate_pooling="mean")
    return CompositeConfig(**given)


class _Fields:
    """The fields of one config, each looked at for what it may be."""

    def __init__(self, config: Mapping[str, Any], described: dict[str, Any], where: Path) -> None:
        self.config, self.described, self.where = config, described, where

    def checked(
        self, only: Mapping[str, Any], read: Mapping[str, Any], idle: tuple[str, ...]
    ) -> dict[str, Any]:
        """The fields that are translated, after those that have one value here."""
        unknown = self.config.keys() - only.keys() - read.keys() - {*idle, "architecture"}
        if unknown:
            self.refuse(min(unknown), "none, it is not known here")
        for name, value in only.items():
            if self.config.get(name, value) != value:
                self.refuse(name, f"{value!r}, the only value that has a counterpart here")
        missing = [n for n, value in read.items() if value is None and self.config.get(n) is None]
        if missing:
            _refuse(missing[0], "a value", None, self.where)
        return {name: self.config.get(name, value) for name, value in read.items()}

    def refuse(self, name: str, words: str) -> None:
        _refuse(name, words, self.config.get(name), self.where)

    def activation(self) -> str:
        name = str(self.config.get("non_linearity", "")).lower()
        if self.described.get("version") is None:
            name = OLD_NAMES.get(name, name)
        if name not in ACTIVATIONS:
            self.refuse("non_linearity", f"one of {', '.join(ACTIVATIONS)}")
        return ACTIVATIONS[name]


def _adapter(fields: _Fields, base: Any) -> BottleneckAdapterConfig:
    is_parallel = bool(fields.config.get("is_parallel", False))
    only = BOTTLENECK_ONLY if is_parallel else BOTTLENECK_ONLY | SEQUENTIAL_ONLY
    idle = (*BOTTLENECK_IDLE, *SEQUENTIAL_ONLY) if is_parallel else BOTTLENECK_IDLE
    read = fields.checked(only, BOTTLENECK_READ, idle)
    factors = read["reduction_factor"]
    if isinstance(factors, Mapping):
        default = factors.get("default")
        per_layer = [factors.get(str(i), default) for i in range(base.num_hidden_layers)]
        if len(set(per_layer)) > 1 or per_layer[0] is None:
            fields.refuse("reduction_factor", "one number for all layers")
        factors = per_layer[0]
    if not isinstance(factors, int | float) or factors <= 0:
        fields.refuse("reduction_factor", "a number above 0")
    if isinstance(read["scaling"], bool) or not isinstance(read["scaling"], int | float):
        fields.refuse("scaling", "a number (a learned one has no counterpart here)")
    if read["init_weights"] not in START_OF_UP:
        fields.refuse("init_weights", f"one of {', '.join(START_OF_UP)}")
    return BottleneckAdapterConfig(
        bottleneck=max(1, int(base.hidden_size // factors)),
        activation=fields.activation(),
        dropout=float(read["dropout"]),
        placement="parallel" if is_parallel else "sequential",
        scale=float(read["scaling"]),
        start=START_OF_UP[read["init_weights"]],
        gated=read["use_gating"],
        gate_pooling="mean",
    )


def _prefix(fields: _Fields, base: Any) -> PrefixTuningConfig:
    read = fields.checked(PREFIX_ONLY, PREFIX_READ, PREFIX_IDLE)
    if not read["flat"] and read["non_linearity"].lower() != "tanh":
        fields.refuse("non_linearity", "'tanh', the only value that has a counterpart here")
    return PrefixTuningConfig(
        prefix_length=read["prefix_length"],
        mid=None if read["flat"] else read["bottleneck_size"],
        skip_layers=tuple(read["leave_out"]),
        gated=read["use_gating"],
        gate_pooling="mean",
    )


def _lora(fields: _Fields, base: Any) -> LoraConfig:
    read = fields.checked(LORA_ONLY, LORA_READ, LORA_IDLE)
    matrices = read["attn_matrices"] if read["selfattn_lora"] else []
    if not set(matrices) <= TARGETS.keys():
        fields.refuse("attn_matrices", f"some of {', '.join(TARGETS)}")
    targets = [TARGETS[each] for each in matrices]
    targets += ["ffn_in"] if read["intermediate_lora"] else []
    targets += ["ffn_out"] if read["output_lora"] else []
    kept = [i for i in range(base.num_hidden_layers) if i not in read["leave_out"]]
    if not targets or not kept:
        fields.refuse("leave_out" if targets else "attn_matrices", "a layer and a place for LoRA")
    return LoraConfig(
        r=read["r"],
        alpha=float(read["alpha"]),
        targets=tuple(targets),
        dropout=float(read["dropout"]),
        gated=read["use_gating"],
        gate_pooling="mean",
        layers=tuple(kept) if read["leave_out"] else (),
    )


READERS: dict[str | None, tuple[str, Any]] = {
    None: ("adapter", _adapter),
    "prefix_tuning": ("prefix", _prefix),
    "lora": ("lora", _lora),
}


def _refuse(name: str, words: str, value: Any, where: Path) -> None:
    raise ValueError(f"from_pretrained: expected {name} as {words}, got {value!r:.120} in {where}")
