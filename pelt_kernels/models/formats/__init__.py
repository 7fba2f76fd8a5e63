"""Adapters that other libraries wrote, read as this project's methods.

A format is a module with two functions, in the list `FORMATS`:

    recognises(folder) -> bool
    read(folder, base) -> (config, tensors), tensors by the names that a `PeltModel` of that config
                          on that base model gives what it trains

`read` changes nothing and raises ValueError for what has no counterpart here, in a sentence that
names the field or the key.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from ...methods import MethodConfig
from . import adapterhub, peft

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMATS = (adapterhub, peft)


def read_foreign(
    directory: str | os.PathLike[str], base: PreTrainedModel
) -> tuple[MethodConfig, dict[str, Tensor]] | None:
    """What another library wrote into a folder; None where it is of none that is known."""
    folder = Path(directory)
    for each in FORMATS:
        if each.recognises(folder):
            return each.read(folder, base)
    return None
