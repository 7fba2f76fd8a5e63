"""AdaMix: a mixture of adapters or LoRA branches with random routing (Wang et al., EMNLP 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ops.gated_adapter.contract import ACTIVATIONS
from ._config import (
    MethodConfig,
    check,
    check_choice,
    check_dropout,
    check_flag,
    check_int,
    check_number,
    set_names,
)
from .adapter import BottleneckAdapterConfig
from .lora import TARGETS, LoraConfig

KINDS = ("adapter", "lora")


@dataclass(frozen=True, kw_only=True)
class AdaMixConfig(MethodConfig):
    """M experts for each side of a module, one drawn for every forward pass while training, their
    average at evaluation.

    ``adapter``: ``W_up φ(W_down f + b_d) + b_u + f`` on the FFN's output f, before its dropout and
    residual. ``lora``: ``alpha / r · (x Aᵀ) Bᵀ`` beside the target projections. The draws of both
    sides are independent, for each layer and pass, one for the whole batch; they come from torch's
    generator of the device, as dropout does (`torch.manual_seed`), so gradient checkpointing needs
    its default ``preserve_rng_state=True``.

    With ``consistency`` c > 0 a training step makes two passes over the batch with draws and
    dropout of their own, in one call of the `PeltModel`, and the loss is the model's own of the
    first pass plus ``c · symmetric_kl(z1, z2)``: over classes of a sentence, of a token that has a
    label, of each choice; over yes and no for each of several labels; over the start and the end of
    an answer. It holds for every family: the official code forgets it for BERT. A regression has
    no classes and leaves it out; so does, with a warning, a forward without labels; and
    ``model.base_model(...)`` is one pass with the base model's own loss. Under torch's
    DistributedDataParallel two passes want checkpointing with ``use_reentrant=False``.

    An optimizer sees a bank as one parameter: experts that were not drawn have a gradient of 0, by
    which AdamW shrinks them and lets their moments fade, as in the authors' own environment. The
    command leaves them alone, and so does a transformers.Trainer with
    ``callbacks=model.callbacks()``; a loop of one's own calls `pelt_kernels.nn.spare_unselected`.

    Other than the authors' code: evaluation always takes the average (their inference level 3; one
    random expert at evaluation is not offered). LoRA's targets draw their experts apart, where the
    authors' fused query and value share one draw. Scores of a regression such as STS-B are not
    clipped at 0.

    Attributes:
        kind: adapter or lora.
        experts: M; 1 is what `PeltModel.merge_experts` leaves.
        share_down: one W_down (A) for all experts. share_up: one W_up (B) for all.
        reduction_factor, bottleneck, activation: the adapter's, as in BottleneckAdapterConfig.
        r, alpha: the LoRA branches', as in LoraConfig. targets: its six names.
        dropout: on the adapter's output, or on the branches' input.
        identical_start: all A of a bank start equal, as in the official LoRA code, where only the
            routing tells them apart later; else each has its own draw. Adapters always differ.
        consistency: c; the papers use 1 for classification and 100 for language models.

    Raises:
        ValueError: a field outside its range, or both sides shared with more than one expert.
    """

    method: ClassVar[str] = "adamix"
    RETIRED: ClassVar[tuple[str, ...]] = ("routing_seed",)

    kind: str = "adapter"
    experts: int = 4
    share_down: bool = False
    share_up: bool = True
    reduction_factor: int = 16
    bottleneck: int | None = None
    activation: str = "gelu"
    r: int = 4
    alpha: float = 32.0
    targets: tuple[str, ...] = ("query", "value")
    dropout: float = 0.0
    identical_start: bool = False
    consistency: float = 1.0

    def __post_init__(self) -> None:
        check_choice(self, "kind", KINDS)
        check_int(self, "experts", 1)
        check_int(self, "reduction_factor", 1)
        check_int(self, "bottleneck", 1, optional=True)
        check_choice(self, "activation", tuple(ACTIVATIONS))
        check_dropout(self, "dropout")
        for name in ("share_down", "share_up", "identical_start"):
            check_flag(self, name)
        check_number(self, "consistency")
        check(self.consistency >= 0, self, "consistency", ">= 0")
        if self.experts > 1 and self.share_down and self.share_up:
            raise ValueError(
                f"AdaMixConfig: expected share_down or share_up to be False with {self.experts} "
                "experts, got both True, which leaves nothing to draw"
            )
        set_names(self, "targets", TARGETS)
        self.as_lora()

    def as_lora(self) -> LoraConfig:
        """The LoRA branch of one expert; checks rank and alpha."""
        return LoraConfig(r=self.r, alpha=self.alpha, targets=self.targets, dropout=self.dropout)

    def as_adapter(self) -> BottleneckAdapterConfig:
        """The adapter of one expert."""
        return BottleneckAdapterConfig(
            reduction_factor=self.reduction_factor,
            bottleneck=self.bottleneck,
            activation=self.activation,
            dropout=self.dropout,
        )

    def bank_sizes(self) -> tuple[int, int]:
        """How many W_down (A) and how many W_up (B) a module holds."""
        return (1 if self.share_down else self.experts, 1 if self.share_up else self.experts)
