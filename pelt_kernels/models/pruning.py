"""PST in a model: how far it has pruned, and how dense that leaves it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..methods import MethodConfig, parts_of
from ..nn import FusedPrunedLinear, PrunedLinear, Pruning


def set_sparsity(model: nn.Module, config: MethodConfig, progress: float) -> None:
    """Gives the pruned Linears of a model the sparsity of a share of the training; a method
    without them has none to set.
    """
    pruning = parts_of(config).pruning
    if pruning is not None:
        sparsity = pruning.sparsity_at(progress)
        for module in model.modules():
            if isinstance(module, Pruning):
                module.sparsity = sparsity


def check_progress(config: MethodConfig, progress: float | None) -> None:
    """Raises ValueError for a training forward of PST that nothing will ever prune, as nobody said
    how far the training is.
    """
    pruning = parts_of(config).pruning
    is_told = progress is not None or pruning is None or not pruning.sparsity
    if not is_told and torch.is_grad_enabled():
        raise ValueError(
            "PSTConfig: expected to be told how far the training is, which the sparsity "
            "follows, got a training forward without; give transformers.Trainer "
            "callbacks=model.callbacks(), or call model.set_progress(share of the steps done) "
            "before each step"
        )


@torch.no_grad()
def density(model: nn.Module, config: MethodConfig) -> dict[str, float]:
    """Of each matrix that PST prunes, by its Linear's name, the share that is not 0 now; where one
    Linear computes several projections, by its name and theirs: ``h.0.attn.c_attn.query``.

    Raises:
        ValueError: another method.
    """
    if parts_of(config).pruning is None:
        raise ValueError(
            f"density: expected the method 'pst', alone or as a part, got {config.method!r}"
        )
    weights = {}
    for name, linear in pruned_linears(model).items():
        if isinstance(linear, PrunedLinear):
            weights[name] = linear.pruned_weight()
        else:
            weights |= {f"{name}.{part}": rows for part, rows in linear.pruned_parts().items()}
    counts = torch.stack([(weight != 0).sum() for weight in weights.values()]).tolist()
    return {
        name: count / weight.numel()
        for (name, weight), count in zip(weights.items(), counts, strict=True)
    }


def pruned_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights as the forward uses them, by the Linears' names."""
    return {name: linear.pruned_weight() for name, linear in pruned_linears(model).items()}


def pruned_linears(model: nn.Module) -> dict[str, PrunedLinear | FusedPrunedLinear]:
    """The Linears that PST prunes, by name."""
    named = model.named_modules()
    kinds = (PrunedLinear, FusedPrunedLinear)
    return {name: module for name, module in named if isinstance(module, kinds)}
