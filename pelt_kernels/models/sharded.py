"""What is trained, where it lies sharded over processes (FSDP2): in one piece, written once."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor


class TrainedState(OrderedDict[str, Any]):
    """A state that holds what is trained. What is frozen may be taken out of it as if it were
    there, which ``get_model_state_dict(ignore_frozen_params=True)`` does. A copy and a file of it
    are a plain OrderedDict's.
    """

    frozen: frozenset[str] = frozenset()

    def pop(self, key: str, *default: Any) -> Any:
        if not default and key in self.frozen:
            return super().pop(key, None)
        return super().pop(key, *default)

    def __reduce__(self) -> Any:
        notes = {name: value for name, value in vars(self).items() if name != "frozen"}
        return OrderedDict, (), notes or None, None, iter(self.items())


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor in one piece. Each process that has a part of a DTensor has to ask for it."""
    return {
        name: tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
        for name, tensor in tensors.items()
    }


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor. Whoever has one has loaded the module that defines it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_writer_of(tensors: Iterable[Tensor]) -> bool:
    """Whether this process writes what all of them have: the first of those that share tensors."""
    if not any(map(is_sharded, tensors)):
        return True
    from torch.distributed import get_rank

    return get_rank() == 0


def trained_of(state: Mapping[str, Tensor], names: Iterable[str], extra: str) -> dict[str, Tensor]:
    """The trained tensors of a state that somebody else has put together, and an extra one where it
    is there.

    Raises:
        ValueError: a trained one is missing.
    """
    names = list(names)
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(
            "save_pretrained: expected a state_dict with every trained parameter, got one without "
            f"{len(missing)} of them ({', '.join(missing[:2])}); leave it out to save the model's"
        )
    return {name: state[name] for name in (*names, extra) if name in state}
