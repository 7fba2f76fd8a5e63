"""transformers' attention function "pelt": a layer with a prefix attends to it, any other as its
model was loaded to.

The mask function of the same name returns the padding mask [B, N] as it came, so it never becomes
dense.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils import logging

from ..nn import PrefixAttention
from ..nn.gate import may_select
from ..nn.packing import Packing
from ..ops.prefix_attention.weights import attention_weights
from ..ops.prefix_attention.without_prefix import SeenKeys
from .attention_config import PELT, AttentionView
from .attention_masks import check_mask, mask_for, padding_mask, window_bias
from .layer_state import PREFIX_ATTRIBUTE, STATE_ATTRIBUTE, LayerPrefix, LayerState
from .samples import MixedState, Rows
from .sdpa import SDPA, by_kernels

logger = logging.get_logger(__name__)


class AttentionCall(NamedTuple):
    """What one call of an attention is given.

    Attributes:
        module: the attention, whose configuration and class say how scores are made.
        query, key, value: [B, H, S, E] and [B, G, N, E] views.
        mask: [B, N] bool, True for real tokens, or None.
        scaling: of the scores; None: 1 / sqrt(E).
        options: transformers' further arguments, such as ``position_bias`` and ``sliding_window``.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    is_causal: bool
    scaling: float | None
    dropout: float
    options: dict[str, Any]

    def of_rows(self, rows: Rows) -> AttentionCall:
        """The same for some samples of the batch."""
        options = dict(self.options)
        bias: Tensor | None = options.get("position_bias")
        if bias is not None and bias.shape[0] > 1:
            options["position_bias"] = bias[rows]
        return self._replace(
            query=self.query[rows],
            key=self.key[rows],
            value=self.value[rows],
            mask=None if self.mask is None else self.mask[rows],
            options=options,
        )

    def token_bias(self) -> Tensor | None:
        """What is added to the scores of the tokens: relative positions, or a window's bounds."""
        position_bias: Tensor | None = self.options.get("position_bias")
        span = self.options.get("sliding_window")
        window = window_bias(self.query, self.key.shape[2], span, self.is_causal)
        if position_bias is None or window is None:
            return window if position_bias is None else position_bias
        return position_bias + window


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention of a layer.

    Args:
        query, key, value: [B, H, S, E] and [B, G, N, E] views; nothing is copied.
        attention_mask: [B, N] bool or None. Of a cache with room for more than N keys, N are read.
        kwargs: ``position_bias`` [1, H, S, N] (T5) is added to the scores of the tokens and is 0 on
            a prefix; ``sliding_window`` bounds which tokens a query sees, never the prefix.

    Returns:
        out [B, S, H, E], and None; with output_attentions=True the weights [B, H, S, P + N], before
        dropout, with the prefix's columns in front, as a prefix in a cache gives them. A layer
        without a prefix has P = 0. They are computed beside the output, which stays what it is.

    Raises:
        ValueError: a mask that is not a padding mask; scores that are capped or have sinks.
    """
    state: LayerState | MixedState | None = getattr(module, STATE_ATTRIBUTE, None)
    # Without a state: a model of its own, built from the configuration of one with a method.
    if state is None and not isinstance(module.config, AttentionView):
        raise ValueError(
            "pelt attention: expected a layer prepared by get_pelt_model, got a "
            f"{type(module).__name__} without; "
            "the attention implementation 'pelt' cannot be chosen by hand"
        )
    check_mask(attention_mask)
    packing = state.in_flight.packing if isinstance(state, LayerState) else None
    if packing is not None:
        query, key, value = (_unpacked(packing, each) for each in (query, key, value))
    if attention_mask is not None:
        filled = attention_mask.shape[1]
        key, value = key[:, :, :filled], value[:, :, :filled]
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = kwargs["position_bias"][..., :filled]
    causal = bool(getattr(module, "is_causal", False))
    call = AttentionCall(
        module, query, key, value, attention_mask, causal, scaling, dropout, kwargs
    )
    own: LayerPrefix | None = getattr(module, PREFIX_ATTRIBUTE, None)
    if own is not None and isinstance(state, LayerState):
        out, weights = prefixed_attention(own, state, call)
    elif isinstance(state, MixedState) and state.prefixes:
        out, weights = mixed_attention(state, call)
    else:
        out, weights = base_attention(call)
    return out if packing is None else packing.pack(out), weights


def _unpacked(packing: Packing, heads: Tensor) -> Tensor:
    """[1, H, T, E] -> [B, H, S, E], a view as an attention makes it."""
    return packing.unpack(heads.transpose(1, 2)).transpose(1, 2)


def prefixed_attention(
    own: LayerPrefix, state: LayerState, call: AttentionCall
) -> tuple[Tensor, Tensor | None]:
    """The attention to a prefix and the tokens. Keys from a cache hold no prefix: it joins them at
    each step anew. A sample whose gate is below the layer's `skip_below` attends to tokens only.
    """
    check_scores(call)
    gate, labels = prefix_gate(own, state, call), own.labels(state, call.query)
    if gate is None or state.skip_below is None:
        return attention_with(own, gate, labels, call)
    is_skipped = gate < state.skip_below
    if not may_select(call.query):
        out, weights = attention_with(own, gate, labels, call)
        plain, plain_weights = attention_without(own, call)
        chooses = is_skipped[:, None, None, None]
        if weights is not None and plain_weights is not None:
            weights = torch.where(chooses, plain_weights, weights)
        return torch.where(chooses, plain, out), weights
    if not is_skipped.any():
        return attention_with(own, gate, labels, call)
    if is_skipped.all():
        return attention_without(own, call)
    kept, skipped = (~is_skipped).nonzero()[:, 0], is_skipped.nonzero()[:, 0]
    if labels is not None:
        labels = {name: each[kept] for name, each in labels.items()}
    found = (
        attention_with(own, gate[kept], labels, call.of_rows(kept)),
        attention_without(own, call.of_rows(skipped)),
    )
    back = torch.cat([kept, skipped]).argsort()
    out = torch.cat([each for each, _ in found])[back]
    parts = [weights for _, weights in found if weights is not None]
    return out, torch.cat(parts)[back] if parts else None


def attention_with(
    own: LayerPrefix,
    gate: Tensor | None,
    labels: dict[str, Tensor] | None,
    call: AttentionCall,
) -> tuple[Tensor, Tensor | None]:
    """The attention to a prefix, which its gate scales, and the tokens."""
    # The same for the kernel and for the weights of those who want to see them.
    options: dict[str, Any] = {
        "gate": gate,
        "labels": labels,
        "key_mask": call.mask,
        "is_causal": call.is_causal,
        "scale": call.scaling,
        # Over an encoder there is none: T5 passes zeros.
        "bias": None if own.is_cross else call.token_bias(),
    }
    out = own.prefixes(own.row, call.query, call.key, call.value, dropout_p=call.dropout, **options)
    weights = None
    if wants_weights(call):
        weights = own.prefixes.weights(own.row, call.query, call.key, **options)
    return out.transpose(1, 2), weights


def attention_without(own: LayerPrefix, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """The attention of a layer that has a prefix to the tokens only; the prefix's columns of the
    weights are zeros.
    """
    out, weights = base_attention(call)
    if weights is None:
        return out, None
    assert isinstance(own.prefixes, PrefixAttention)  # others have no gate
    return out, nn.functional.pad(weights, (own.prefixes.columns, 0))


def mixed_attention(mixed: MixedState, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """The attention of a mixed batch: each sample's with its adapter's prefix, or without.

    Raises:
        ValueError: the weights are wanted, and prefixes differ in how many columns they have.
    """
    found: list[Tensor] = []

    def attend(name: str, rows: Rows) -> Tensor:
        own, state = mixed.prefixes.get(name), mixed.states.get(name)
        part = call.of_rows(rows)
        if own is None or state is None:
            out, weights = base_attention(part)
        else:
            out, weights = prefixed_attention(own, state, part)
        if weights is not None:
            found.append(weights)
        return out

    out = mixed.samples.each(call.query, attend)
    if not found:
        return out, None
    columns = [weights.shape[-1] for weights in found]
    if len(set(columns)) > 1:
        raise ValueError(
            "pelt attention: expected prefixes of one length for the attention weights of a batch, "
            f"got weights of {columns} columns; call each adapter by itself for them"
        )
    parts = iter(found)
    return out, mixed.samples.each(call.query, lambda name, rows: next(parts))


def prefix_gate(own: LayerPrefix, state: LayerState, call: AttentionCall) -> Tensor | None:
    """What scales the prefix, [B], or None."""
    pooled = state.take_prefix_gate()
    if own.gate == "number":
        assert isinstance(own.prefixes, PrefixAttention)
        gate = own.prefixes.gate(own.row).expand(call.query.shape[0])
        if state.wants_values(call.module.training):
            gate = state.ruled(own.kind, gate)
        state.record(own.kind, gate)
        return gate
    if own.gate == "pooled" and pooled is None:
        raise RuntimeError(
            f"pelt attention: layer {state.number} has a gated prefix but its query projection was "
            "not called before the attention"
        )
    return pooled


def check_scores(call: AttentionCall) -> None:
    """Raises ValueError for scores that `prefix_attention` does not compute."""
    for name in ("softcap", "s_aux"):
        if call.options.get(name) is not None:
            raise ValueError(
                f"pelt attention: expected the softmax of plain scores for a prefix, got {name} of "
                f"{type(call.module).__name__}; leave the prefix out for this model"
            )


def wants_weights(call: AttentionCall) -> bool:
    """Whether this call is asked for attention weights, as transformers decides it; then says once
    what that costs.
    """
    if "output_attentions" in call.options:
        is_asked = call.options["output_attentions"]
    else:  # a configuration answers slowly
        is_asked = getattr(call.module.config, "output_attentions", False)
    if not is_asked:
        return False
    if not torch.compiler.is_compiling():
        logger.warning_once(
            "pelt attention: output_attentions=True: the weights [B, H, S, P + N] are computed by "
            "PyTorch beside the kernels, which never make them, prefix columns first; leave it out "
            "where speed and memory matter"
        )
    return True


def base_attention(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """The attention the base model was loaded with, with the mask in the form that one wants."""
    module: Any = call.module
    name = module.config.base_attention
    if name == "eager":
        function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if function is None:
            raise ValueError(
                f"pelt attention: expected {type(module).__module__} to define "
                "eager_attention_forward, got none"
            )
    else:
        function = AttentionInterface()[name]
    query, key, value, is_causal = call.query, call.key, call.value, call.is_causal
    window = call.options.get("sliding_window")
    out: Tensor | None = None
    weights: Tensor | None = None
    if name == SDPA and (window is None or key.shape[2] <= window):
        find = partial(SeenKeys, call.mask, is_causal)
        out = by_kernels(query, key, value, find, call.scaling, call.dropout, call.options)
    if out is None:
        out, weights = function(
            module,
            query,
            key,
            value,
            mask_for(name, module, query, key, call.mask, is_causal, window),
            scaling=call.scaling,
            dropout=call.dropout,
            **call.options,
        )
    if weights is None and wants_weights(call):
        weights = attention_weights(
            query,
            key,
            key_mask=call.mask,
            is_causal=is_causal,
            scale=call.scaling,
            bias=call.token_bias(),
        )
    return out, weights


# Without a mask function of the same name transformers would drop the mask in silence. Here and not
# where a method is put in: a pickled model meets this module and nothing else.
AttentionInterface.register(PELT, attention_forward)
AttentionMaskInterface.register(PELT, padding_mask)
