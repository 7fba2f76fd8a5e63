"""Low-rank adaptation of frozen projections (Hu et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ._config import (
    Counts,
    MethodConfig,
    Names,
    Numbers,
    check,
    check_choice,
    check_dropout,
    check_flag,
    check_gate,
    check_int,
    check_number,
    check_pattern,
    set_counts,
    set_layers,
    set_modules,
    set_numbers,
)

TARGETS = ("query", "key", "value", "attention_output", "ffn_in", "ffn_out")
ALL_LINEAR = "all-linear"
MAX_RANK = 256
BIASES = ("none", "lora_only", "all")


@dataclass(frozen=True, kw_only=True)
class LoraConfig(MethodConfig):
    """``y = x Wᵀ + b + s · (dropout(x) Aᵀ) Bᵀ`` with s = alpha / r, or s = g(x) where the branch is
    gated.

    A gate replaces alpha / r, as in UniPELT's code; alpha then has no effect. Each target has its
    own gate.

    Targets have one name in all families (query, key, value, attention_output, ffn_in, ffn_out), or
    their modules' own, by which LoRA without gates serves every transformers model: where a name is
    no place of the model's family, it is a module's. Of a Linear that computes several projections
    (GPT-2's c_attn) ``query`` is the columns of one, and its module's name all of them, with one
    branch. The trained head and output embeddings take no branch. What fits nothing in a model is
    refused when the method is put in.

    Attributes:
        r: rank, 1 to 256.
        alpha: numerator of the scale.
        targets: a list of those six names, and of modules by the ends of their names (``q_proj``,
            ``attn.c_proj``); one text that is a regular expression for modules' whole names; or
            ``all-linear``: every Linear.
        dropout: on the branch's input.
        gated: whether g (per sentence) is learned; None: as the method says.
        gate_pooling: ``masked_mean`` or ``mean``.
        exclude: modules to leave out, by ends of names or one regular expression.
        rank_pattern, alpha_pattern: another r or alpha for some modules, by one of the six names or
            a regular expression for the end of a module's name; the first that fits counts.
        layers: only the modules of these layers, by the first number in a module's name; an
            encoder's and a decoder's are both counted from 0. None given: of all.
        use_rslora: s = alpha / sqrt(r).
        bias: which biases of the model are trained, too: ``none``, those of the Linears on which
            LoRA works (``lora_only``), or ``all``.

    Raises:
        ValueError: a field outside its range.
    """

    method: ClassVar[str] = "lora"

    r: int = 8
    alpha: float = 16.0
    targets: Names = ("query", "value")
    dropout: float = 0.0
    gated: bool | None = None
    gate_pooling: str = "masked_mean"
    exclude: Names = ()
    rank_pattern: Counts = ()
    alpha_pattern: Numbers = ()
    layers: tuple[int, ...] = ()
    use_rslora: bool = False
    bias: str = "none"

    def __post_init__(self) -> None:
        check_int(self, "r", 1)
        check(self.r <= MAX_RANK, self, "r", f"<= {MAX_RANK}")
        check_number(self, "alpha")
        words = f"{', '.join(TARGETS)}, ends of modules' names"
        set_modules(self, "targets", words, (ALL_LINEAR,))
        # As a regular expression one of the six names would fit no module but one of that name.
        is_list = isinstance(self.targets, tuple)
        is_right = bool(self.targets) and (is_list or self.targets not in TARGETS)
        is_right = is_right and not (is_list and ALL_LINEAR in self.targets)
        choices = f"one regular expression or {ALL_LINEAR!r}"
        check(is_right, self, "targets", f"as a list of names ({words}), or {choices}")
        check_dropout(self, "dropout")
        check_gate(self)
        set_modules(self, "exclude", "ends of modules' names")
        set_counts(self, "rank_pattern", 1)
        set_numbers(self, "alpha_pattern")
        check(all(r <= MAX_RANK for _, r in self.ranks), self, "rank_pattern", f"<= {MAX_RANK}")
        for name, pairs in (("rank_pattern", self.ranks), ("alpha_pattern", self.alphas)):
            for pattern, _ in pairs:
                check_pattern(self, name, pattern)
        set_layers(self, "layers")
        check_flag(self, "use_rslora")
        check_choice(self, "bias", BIASES)

    @property
    def places(self) -> tuple[str, ...]:
        """The targets that are places of a layer in every family."""
        listed = self.targets if isinstance(self.targets, tuple) else ()
        return tuple(target for target in listed if target in TARGETS)

    @property
    def ranks(self) -> tuple[tuple[str, int], ...]:
        """`rank_pattern` as it is kept."""
        return self.rank_pattern  # type: ignore[return-value]  # `set_counts` made it a tuple

    @property
    def alphas(self) -> tuple[tuple[str, float], ...]:
        """`alpha_pattern` as it is kept."""
        return self.alpha_pattern  # type: ignore[return-value]  # `set_numbers` made it a tuple
