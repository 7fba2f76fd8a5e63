"""HyperPELT: a network that writes each task's adapters and prefixes (Zhang et al., 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ops.gated_adapter.contract import ACTIVATIONS
from ._config import MethodConfig, check_choice, check_flag, check_int, set_tasks


@dataclass(frozen=True, kw_only=True)
class HyperPELTConfig(MethodConfig):
    """An adapter beside each FFN and a prefix in front of each attention (encoder's, decoder's, and
    the decoder's over the encoder), all written by one network for each stack of layers from
    embeddings of task, layer and block (`pelt_kernels.nn.HyperNetwork`):

        FFN(x) + λ LN( W_up φ( W_down x + b_down ) + b_up )      with everything but λ written
        softmax( Q [Pk ; K]ᵀ ) [Pv ; V]                             with Pk and Pv written

    What is written depends on the task only, so a batch may mix tasks, and
    `PeltModel.materialize(task)` leaves an adapter and a prefix in each layer and no network. With
    ``features`` an image has a part in the embedding of the task, and each sample has weights of
    its own. The paper gives no sizes: embeddings, hidden layer, starting values, epsilons and the
    reduction are those of HyperFormer++ (Mahabadi et al., ACL 2021), the prefix's length is that of
    UniPELT.

    Attributes:
        tasks: their names, in the order of their numbers.
        prefix_length: P; 0: no prefixes.
        reduction_factor: D / R, rounded down. bottleneck: R itself, which wins; 0: no adapters.
        activation: φ.
        embedding_size: of tasks, layers and blocks. mid: of the hidden layer. size: of the
            hyper-embedding that all weights are written from.
        train_norms: whether the model's own norms are trained, as in the papers.
        features: the width of an image's features [B, cells, features]; None: text only.
        materialized: of one task, whose written weights are the parameters; what
            `PeltModel.materialize` leaves.

    Raises:
        ValueError: a field outside its range.
    """

    method: ClassVar[str] = "hyperpelt"

    tasks: tuple[str, ...] = ("main",)
    prefix_length: int = 10
    reduction_factor: int = 32
    bottleneck: int | None = None
    activation: str = "gelu_tanh"
    embedding_size: int = 64
    mid: int = 128
    size: int = 64
    train_norms: bool = True
    features: int | None = None
    materialized: bool = False

    def __post_init__(self) -> None:
        set_tasks(self)
        check_int(self, "prefix_length", 0)
        check_int(self, "bottleneck", 0, optional=True)
        check_int(self, "features", 1, optional=True)
        for name in ("reduction_factor", "embedding_size", "mid", "size"):
            check_int(self, name, 1)
        check_choice(self, "activation", tuple(ACTIVATIONS))
        check_flag(self, "train_norms")
        check_flag(self, "materialized")
        if self.prefix_length == 0 and self.bottleneck == 0:
            raise ValueError(
                "HyperPELTConfig: expected prefix_length or bottleneck >= 1, got 0 for both, which "
                "leaves nothing to write"
            )
        if self.materialized and (len(self.tasks) > 1 or self.features is not None):
            raise ValueError(
                "HyperPELTConfig: expected materialized weights of one task without images, got "
                f"{len(self.tasks)} tasks and features={self.features}"
            )

    def bottleneck_of(self, hidden_size: int) -> int:
        """R for a model of size D; 0: no adapters.

        Raises:
            ValueError: the reduction factor leaves nothing of D.
        """
        if self.bottleneck is not None:
            return self.bottleneck
        if hidden_size < self.reduction_factor:
            raise ValueError(
                "HyperPELTConfig: expected reduction_factor <= the model's hidden size "
                f"{hidden_size}, got {self.reduction_factor}; lower it or set bottleneck"
            )
        return hidden_size // self.reduction_factor
