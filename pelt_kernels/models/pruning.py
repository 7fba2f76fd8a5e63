"""PST in a model: how far it has pruned, and how dense that leaves it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..methods import MethodConfig, parts_of
from ..nn import PrunedLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Prunable(nn.Module):
    """What `PeltModel` does for PST."""

    _progress: float | None = None  # as `set_progress` was told; None: never

    if TYPE_CHECKING:
        base_model: PreTrainedModel
        method_config: MethodConfig

        def _check_attached(self, who: str) -> None: ...
        def _take_out(self, keep_head: bool = False, keep_trained: bool = False) -> None: ...
        def _put(self, values: dict[str, Tensor]) -> None: ...

    def set_progress(self, progress: float) -> None:
        """Tells the method which share of the training is done: PST's sparsity follows it, for
        every forward from here on. A new model stands at 0, a loaded one at 1.
        """
        self._progress = progress
        pruning = parts_of(self.method_config).pruning
        if pruning is not None:
            sparsity = pruning.sparsity_at(progress)
            for module in self._pruned("set_progress").values():
                module.sparsity = sparsity

    def _check_progress(self) -> None:
        """Raises ValueError for a training forward of PST that nothing will ever prune."""
        pruning = parts_of(self.method_config).pruning
        is_told = self._progress is not None or pruning is None or not pruning.sparsity
        if not is_told and torch.is_grad_enabled():
            raise ValueError(
                "PSTConfig: expected to be told how far the training is, which the sparsity "
                "follows, got a training forward without; give transformers.Trainer "
                "callbacks=model.callbacks(), or call model.set_progress(share of the steps done) "
                "before each step"
            )

    @torch.no_grad()
    def density(self) -> dict[str, float]:
        """Of each matrix that PST prunes, by its Linear's name, the share that is not 0 now."""
        weights = self._pruned_weights("density")
        counts = torch.stack([(weight != 0).sum() for weight in weights.values()]).tolist()
        return {
            name: count / weight.numel()
            for (name, weight), count in zip(weights.items(), counts, strict=True)
        }

    def _pruned_weights(self, who: str) -> dict[str, Tensor]:
        return {name: module.pruned_weight() for name, module in self._pruned(who).items()}

    def _pruned(self, who: str) -> dict[str, PrunedLinear]:
        if parts_of(self.method_config).pruning is None:
            raise ValueError(
                f"{who}: expected the method 'pst', alone or as a part, got "
                f"{self.method_config.method!r}"
            )
        named = self.base_model.named_modules()
        return {name: module for name, module in named if isinstance(module, PrunedLinear)}
