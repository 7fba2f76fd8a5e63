"""PST: sparse training with few parameters (Li et al., IJCAI 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ._config import MethodConfig, check, check_flag, check_int, check_number, set_names
from .lora import TARGETS


@dataclass(frozen=True, kw_only=True)
class PSTConfig(MethodConfig):
    """Every Linear of a layer is pruned by learned scores while a low-rank update is learned:
    ``W = W0 + beta U V``, ``S = |W| + alpha1 A B + alpha2 (R 1ᵀ + 1 Cᵀ)``, and all but the int(n ·
    sparsity) lowest entries of each matrix of n stay (`pelt_kernels.masked_weight`).

    The sparsity is raised over training: 0 until ``begin`` of it, then ``s · (1 - (1 - t)³)`` with
    t the share of the way to ``end``, then s. The sparsity has to be told how far the training is:
    the command does, a transformers.Trainer with ``callbacks=model.callbacks()`` does, and a loop
    of one's own calls `PeltModel.set_progress` before each step and after the last; a training
    forward that was never told raises. A model that is loaded has its final sparsity.

    Other than the authors' code: among equal scores the entry that comes first in memory stays,
    where theirs follow an unstable sort; an evaluation exactly at ``end`` counts as one at the
    final sparsity; and the command warms the learning rate up and clips the gradient's norm at 1,
    as for every method, where their recipe does neither.

    Attributes:
        sparsity: s in [0, 1), of each matrix by itself.
        r1, r2: ranks of the update U V and of the scores A B.
        beta, alpha1, alpha2: factors.
        begin, end: shares of the training, 0 <= begin < end <= 1.
        targets: which Linears of a layer; all six by default.
        train_head: False leaves the classification head at its start, as the official optimizer
            does, which holds only U, V and the scores.

    Raises:
        ValueError: a field outside its range.
    """

    method: ClassVar[str] = "pst"

    sparsity: float = 0.9
    r1: int = 8
    r2: int = 8
    beta: float = 1.0
    alpha1: float = 1.0
    alpha2: float = 1.0
    begin: float = 0.1
    end: float = 0.7
    targets: tuple[str, ...] = TARGETS
    train_head: bool = True

    def __post_init__(self) -> None:
        for name in ("sparsity", "beta", "alpha1", "alpha2", "begin", "end"):
            check_number(self, name)
        check(0.0 <= self.sparsity < 1.0, self, "sparsity", "in [0, 1)")
        if not 0.0 <= self.begin < self.end <= 1.0:
            raise ValueError(
                "PSTConfig: expected 0 <= begin < end <= 1 (shares of the training), got "
                f"begin={self.begin!r} and end={self.end!r}: the schedule is longer than the "
                "training or runs backwards"
            )
        check_int(self, "r1", 1)
        check_int(self, "r2", 1)
        set_names(self, "targets", TARGETS)
        check_flag(self, "train_head")

    def sparsity_at(self, progress: float) -> float:
        """The sparsity when a share of the training is done."""
        if progress <= self.begin:
            return 0.0
        if progress > self.end:
            return self.sparsity
        left = 1 - (progress - self.begin) / (self.end - self.begin)
        return self.sparsity * (1 - left**3)
