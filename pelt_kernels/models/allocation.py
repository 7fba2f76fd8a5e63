"""How much memory a method's parts will take, told before they take it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..methods import MethodConfig, parts_of
from .inject import Injection

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _WithoutMemory(TorchFunctionMode):
    """Inside, new tensors are made on the meta device, and one of more than `largest` numbers is
    not made at all.
    """

    def __init__(self, largest: int) -> None:
        super().__init__()
        self.largest = largest

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if "device" not in kwargs:
            return func(*args, **kwargs)
        try:
            made = func(*args, **kwargs | {"device": "meta"})
        except (RuntimeError, TypeError, OverflowError) as error:
            raise _TooLargeError("a tensor of sizes beyond 64 bits") from error
        if isinstance(made, Tensor) and made.numel() > self.largest:
            raise _TooLargeError(f"a tensor of {made.numel():,}")
        return made


class _TooLargeError(Exception):
    pass


def check_size(
    model: PreTrainedModel,
    config: MethodConfig,
    tensors: Mapping[str, Tensor],
    where: str | os.PathLike[str],
) -> None:
    """Raises ValueError where the config's sizes ask for more new numbers in the model than the
    tensors of its file hold; neither is the model changed nor memory taken.
    """
    held = sum(tensor.numel() for tensor in tensors.values())
    own = {id(parameter): parameter.numel() for parameter in model.parameters()}
    try:
        with _WithoutMemory(held + sum(own.values())):
            injection = Injection(model, parts_of(config))
    except _TooLargeError as error:
        needed = str(error)
    else:
        modules = [replacement.adapted for replacement in injection.replacements]
        written = None if injection.written is None else injection.written.weights
        for module in (injection.prefix, injection.task_adapters, written):
            if module is not None:
                modules.append(module)
        new = {id(p): p.numel() for module in modules for p in module.parameters()}
        total = sum(count for key, count in new.items() if key not in own)
        if total <= held:
            return
        needed = f"{total:,}"
    raise ValueError(
        f"from_pretrained: expected the sizes in the config of {where} to be those of its "
        f"{held:,} numbers, got {needed} for {config!r:.200}"
    )
