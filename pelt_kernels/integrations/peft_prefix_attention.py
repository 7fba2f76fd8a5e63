"""The attention of a model with PEFT's prefixes: one function of transformers' for each attention
that a model may have been loaded with.

A layer with a prefix attends to it by `prefix_attention`; every other call (of an encoder beside
the decoder that has prefixes, of a step of `generate` on PEFT's cache, with the adapter disabled)
goes to the attention that the model was loaded with, with the mask that one wants. Beside prefixes
that is "pelt_sdpa" for "sdpa".
"""

from __future__ import annotations

import sys
import threading
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.masking_utils import causal_mask_function

from ..models.attention_config import PELT_SDPA
from ..models.attention_masks import check_mask
from ..models.sdpa import SDPA
from ..ops import Prefix, prefix_attention
from ..ops.prefix_attention.weights import attention_weights
from ..ops.prefix_attention.without_prefix import is_for_cpu

ARGUMENT = "pelt_prefix"  # under which a call's prefixes travel through a model to its attention
ROW = "pelt_prefix_row"  # of an attention: which of the prefixes is its own
_BEFORE = "pelt_prefix_"  # the name of the attention that the model was loaded with
SERVED = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")


class PrefixCall:
    """The prefixes of one forward of a model.

    It travels with the arguments of the layers, so a layer that is checkpointed is computed again
    with the prefixes of its own forward, whichever adapter is active by then.

    A layer's rows are views of parameters: each layer computes its own keys and values, inside its
    own checkpoint, and backward joins the gradients of all layers once.

    Args:
        encoder: PEFT's PrefixEncoder.
        config: its config: P, L, G heads of size E.
        backend: for `prefix_attention`.
        has_two_stacks: whether PEFT makes the cache of an encoder with a decoder.
        relative: the attention whose relative positions serve all layers (T5), or None.
        wants_weights: whether the call is asked for attention weights.
    """

    def __init__(
        self,
        encoder: Any,
        config: Any,
        backend: str | None,
        has_two_stacks: bool,
        relative: Any,
        wants_weights: bool,
    ) -> None:
        self.length, self.pairs = config.num_virtual_tokens, config.num_layers
        self.heads = config.num_attention_heads
        self.backend, self.has_two_stacks, self.relative = backend, has_two_stacks, relative
        self.wants_weights = wants_weights
        self.inputs: dict[str, Tensor] = {}
        self.hidden = getattr(encoder, "transform", None)
        self.embedding: Tensor = encoder.embedding.weight
        rows = 2 * self.pairs
        if self.hidden is None:
            columns = self.embedding.view(self.length, rows, self.heads, -1)
            self.tables = columns.unbind(1)
        else:
            up = self.hidden[2]
            self.weights = up.weight.view(rows, -1, up.in_features).unbind(0)
            self.biases = up.bias.view(rows, -1).unbind(0)

    def prefix(self, row: int, like: Tensor) -> Prefix:
        """Keys and values [P, G, E] of a layer.

        Of an encoder with a decoder PEFT's cache hands the prefixes out in fours, of which it uses
        the first two: layer i has pair 2·i, counted round.
        """
        pair = 2 * row % self.pairs if self.has_two_stacks else row
        if self.hidden is None:
            made = self.tables[2 * pair], self.tables[2 * pair + 1]
        else:
            h = self.hidden[1](self.hidden[0](self.embedding))
            made = self._up(h, 2 * pair), self._up(h, 2 * pair + 1)
        # Beside 16-bit activations a float32 prefix stays what it is, and so does its gradient.
        keeps = made[0].dtype in (like.dtype, torch.float32)
        dtype = made[0].dtype if keeps else like.dtype
        k, v = (each.to(like.device, dtype) for each in made)
        return Prefix(k, v)

    def _up(self, h: Tensor, row: int) -> Tensor:
        made = functional.linear(h, self.weights[row], self.biases[row])
        return made.view(self.length, self.heads, -1)


class InFlight(threading.local):
    """The forward that is going on in this thread.

    Only what is made once for a whole model reads it, the cache and the masks; layers, which may be
    computed a second time in backward, do not.
    """

    call: PrefixCall | None = None


in_flight = InFlight()


class PrefixPositions(Cache):
    """A cache that says P keys are there before the tokens, as PEFT's says, and holds none: so
    positions begin at P, and attention is handed the tokens' own keys.
    """

    def __init__(self, length: int) -> None:
        super().__init__(layers=[])
        self.length = length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states


def attention_name(base: str) -> str:
    """transformers' name of the attention here for a model that was loaded with `base`."""
    return _BEFORE + base


def base_name(name: str) -> str:
    """The attention that a model was loaded with."""
    return name.removeprefix(_BEFORE)


def attention_forward(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer: query [B, H, S, E], key and value [B, G, N, E] -> out [B, S, H, E],
    and the weights [B, H, S, P + N] where output_attentions=True asks for them, else None.

    With a prefix attention_mask is [B, N] bool or None, else as `base` has it.

    Raises:
        ValueError: a mask that is not a padding mask.
    """
    call: PrefixCall | None = kwargs.pop(ARGUMENT, None)
    row: int | None = getattr(module, ROW, None)
    if call is None and row is not None and in_flight.call is not None:
        raise ValueError(
            f"pelt prefix: expected {type(module).__name__} to be given its model's prefixes, got "
            "none; restore() the model, and PEFT runs it"
        )
    if call is None or row is None:
        if base == "eager":
            function = sys.modules[type(module).__module__].eager_attention_forward
        else:
            by_kernels = base == SDPA and call is not None and is_for_cpu(call.backend)
            function = AttentionInterface()[PELT_SDPA if by_kernels else base]
        return function(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    check_mask(attention_mask)
    prefix = call.prefix(row, query)
    prefixes, bias = [prefix], kwargs.get("position_bias")
    if bias is not None:
        key, value, attention_mask, bias = _joined(
            call, prefix, query, key, value, attention_mask, bias
        )
        prefixes = []
    is_causal = bool(getattr(module, "is_causal", False))
    options: dict[str, Any] = {
        "key_mask": attention_mask,
        "is_causal": is_causal,
        "bias": bias,
        "scale": scaling,
    }
    out = prefix_attention(
        query, key, value, prefixes, dropout_p=dropout, backend=call.backend, **options
    )
    assert isinstance(out, Tensor)
    weights = None
    if call.wants_weights:
        weights = attention_weights(query, key, prefixes, **options)
    return out.transpose(1, 2), weights


def _joined(
    call: PrefixCall,
    prefix: Prefix,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Keys, values, mask and bias with the prefix as the first P tokens: in PEFT's cache it has
    relative positions as tokens have, and `prefix_attention` adds none to a prefix.
    """
    batch, length = len(query), call.length
    k, v = (
        torch.cat([each.to(own.dtype).transpose(0, 1).expand(batch, -1, -1, -1), own], 2)
        for each, own in ((prefix.k, key), (prefix.v, value))
    )
    if mask is not None:
        mask = functional.pad(mask, (length, 0), value=True)
    before = call.relative.compute_bias(
        query.shape[2], length, device=query.device, past_seen_tokens=length
    )
    return k, v, mask, torch.cat([before.to(bias.dtype), bias], -1)


def attention_mask(base: str, *args: Any, **kwargs: Any) -> Any:
    """transformers' mask function: during a forward with prefixes the padding mask [B, N] bool of
    the tokens, so it never becomes dense; else what `base` wants.

    transformers names every argument.
    """
    call = in_flight.call
    if call is None or (
        call.has_two_stacks and kwargs["mask_function"] is not causal_mask_function
    ):
        return AttentionMaskInterface()[PELT_SDPA if base == SDPA else base](*args, **kwargs)
    mask: Tensor | None = kwargs["attention_mask"]
    return None if mask is None else mask[:, -kwargs["q_length"] :]


# Where this module is imported, as a pickled model imports it: without a mask function of the same
# name transformers would drop the mask in silence.
for _base in SERVED:
    AttentionInterface.register(attention_name(_base), partial(attention_forward, _base))
    AttentionMaskInterface.register(attention_name(_base), partial(attention_mask, _base))
