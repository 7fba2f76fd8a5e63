"""PEFT's LoRA layers beside a Linear that bitsandbytes or torchao quantised.

The product of the base layer stays its library's; a branch is two more products, of which the
second adds to the base's output as it writes. PEFT's layer reads and writes that output up to four
times more: to copy it (4 bits), to scale the branch, to cast it and to add it.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from peft.import_utils import is_bnb_4bit_available
from peft.tuners.lora import layer as lora
from peft.tuners.lora.torchao import TorchaoLoraLinear
from torch import Tensor, nn

from .calls import is_dense
from .peft_branches import added, branches_of
from .replacement import Accelerated

BESIDE = "torch.addmm"


class AcceleratedQuantised(Accelerated):
    """Calls the base layer, and adds the active adapters in as few passes as there can be."""

    rounds_each: ClassVar[bool] = False  # `added`'s

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's: y [..., Dout] in the base layer's dtype."""
        layer: Any = self
        if (
            not args
            and not kwargs
            and not layer._disable_adapters
            and not layer.merged_adapters
            and is_dense(x)
            # Where PEFT leaves dtypes to autocast, it may end in another one than the base's.
            and not torch.is_autocast_enabled()
        ):
            branches = branches_of(layer, layer.active_adapters)
            if branches:
                base: Tensor = layer.base_layer(x)
                return added(base, x, branches, rounds_each=self.rounds_each)
        theirs: Any = super()
        y: Tensor = theirs.forward(x, *args, **kwargs)
        return y


class AcceleratedByHand(AcceleratedQuantised, lora.Linear):
    """PEFT's usual layer, of a base that was quantised without PEFT's knowing."""


class AcceleratedTorchao(AcceleratedQuantised, TorchaoLoraLinear):
    """PEFT's layer beside torchao's weights."""


KINDS: dict[type[nn.Module], type[nn.Module]] = {
    lora.Linear: AcceleratedByHand,
    TorchaoLoraLinear: AcceleratedTorchao,
}

if is_bnb_4bit_available():
    from peft.tuners.lora import bnb

    class AcceleratedLinear4bit(AcceleratedQuantised, bnb.Linear4bit):
        """PEFT's layer beside bitsandbytes' 4 bits."""

        rounds_each = True

    class AcceleratedLinear8bit(AcceleratedQuantised, bnb.Linear8bitLt):
        """PEFT's layer beside bitsandbytes' 8 bits."""

        rounds_each = True

    KINDS |= {bnb.Linear4bit: AcceleratedLinear4bit, bnb.Linear8bitLt: AcceleratedLinear8bit}
