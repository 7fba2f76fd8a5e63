"""The hook into transformers' attention: a function and a mask function, both registered as "pelt".

The mask function returns the padding mask [B, N] as it came, so it never becomes dense. The
attention function gives a layer with a prefix to `prefix_attention`, and any other layer to the
attention the base model was loaded with.
"""

from __future__ import annotations

import copy
import sys
import threading
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function
from transformers.utils import logging

from ..nn import PrefixAttention
from ..ops.prefix_attention.weights import attention_weights
from .attention_config import PELT, AttentionView

logger = logging.get_logger(__name__)

SITE = "_pelt_site"
FORWARDS = "_pelt_forwards"


class InFlight(threading.local):
    """What travels between the modules of one layer during one forward of that layer.

    It is written and read within a layer's forward, so the recomputation of a checkpointed layer
    writes its own, and it belongs to one thread, so a model that serves several threads (or is
    replicated over them) does not mix sentences.
    """

    mask: Tensor | None = None
    prefix_gate: Tensor | None = None
    ffn_input: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> InFlight:
        return InFlight()

    def __reduce__(self) -> tuple[type[InFlight], tuple[()]]:
        return InFlight, ()


class Forwards(threading.local):
    """Keeps a forward that begins inside another one, in a hook of one of its modules, apart from
    it: what is in flight in the layers waits until the inner forward has ended.
    """

    def __init__(self, sites: list[LayerSite]) -> None:
        self.sites = sites
        self.waiting: list[list[tuple[InFlight, dict[str, Any]]]] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Forwards:
        return Forwards(copy.deepcopy(self.sites, memo))

    def __reduce__(self) -> tuple[type[Forwards], tuple[list[LayerSite]]]:
        return Forwards, (self.sites,)


class LayerSite:
    """What is known about one layer, hung on its attention module.

    Args:
        layer: the layer's number.
        prefix, prefix_row: the model's prefixes, and which of them is this layer's; None without a
            prefix.
        needs_mask: whether a gate of this layer pools over real tokens only.
    """

    def __init__(
        self,
        layer: int,
        prefix: PrefixAttention | None,
        prefix_row: int,
        has_prefix_gate: bool,
        needs_mask: bool,
    ) -> None:
        self.layer = layer
        self.prefix, self.prefix_row = prefix, prefix_row
        self.has_prefix_gate, self.needs_mask = has_prefix_gate, needs_mask
        self.in_flight = InFlight()
        self.is_recording = False
        self.gate_values: dict[str, Tensor] = {}

    def record(self, kind: str, value: Tensor) -> None:
        """Keeps the latest value of a gate, on its device, without waiting for it."""
        if self.is_recording:
            self.gate_values[kind] = value.detach()


def register_attention() -> None:
    """Makes "pelt" known; without a mask function transformers would drop the mask in silence."""
    AttentionInterface.register(PELT, attention_forward)
    AttentionMaskInterface.register(PELT, padding_mask)


def padding_mask(
    *args: Any,
    q_length: int = 0,
    kv_length: int = 0,
    q_offset: int = 0,
    attention_mask: Tensor | None = None,
    mask_function: Any = bidirectional_mask_function,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask function for "pelt": the padding mask [B, N] bool itself, or None.

    Whether queries see later keys is not in it: the attention module says that of itself.
    """
    if mask_function is bidirectional_mask_function:
        return attention_mask
    if mask_function is not causal_mask_function:
        raise ValueError(
            "pelt attention: expected a bidirectional or a causal mask, got an overlaid one "
            "(packed sentences, windows), which gates and prefixes do not support"
        )
    if kv_length != q_offset + q_length:
        raise ValueError(
            f"pelt attention: expected a cache that grows with the text, got {kv_length} keys for "
            f"{q_offset + q_length} tokens; leave cache_implementation at its default"
        )
    return attention_mask


def begin_forward(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook of the encoder: lets what is in flight wait."""
    if torch.compiler.is_compiling():
        return
    forwards: Forwards = getattr(module, FORWARDS)
    waiting = []
    for site in forwards.sites:
        flight = site.in_flight
        # Spelled out, as nearly every forward finds nothing here.
        if (
            flight.mask is not None
            or flight.prefix_gate is not None
            or flight.ffn_input is not None
        ):
            waiting.append((flight, vars(flight).copy()))
            vars(flight).clear()
    forwards.waiting.append(waiting)


def end_forward(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of the encoder, called after an error too: what waited goes on."""
    if torch.compiler.is_compiling():
        return
    for in_flight, state in getattr(module, FORWARDS).waiting.pop():
        vars(in_flight).clear()
        vars(in_flight).update(state)


def read_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of an attention module: takes the layer's mask from the arguments of this
    very call.

    It sits on the attention and not on the layer, because transformers checkpoints a layer's
    forward: hooks of the layer are outside of what is computed again, hooks of its modules are
    inside.
    """
    site: LayerSite = getattr(module, SITE)
    config: Any = module.config
    if config._attn_implementation != PELT:
        raise ValueError(
            f"pelt attention: expected the attention implementation {PELT!r} (set by "
            "get_pelt_model), got "
            f"{config._attn_implementation!r}; it was changed afterwards. Choose the base "
            "model's attention before "
            "get_pelt_model"
        )
    mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    check_mask(mask)
    site.in_flight.mask = mask if site.needs_mask else None
    site.in_flight.prefix_gate = None


def keep_ffn_input(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Pre-hook of the FFN's first Linear: leaves its input with the layer, for a parallel adapter
    at the layer's end.
    """
    getattr(module, SITE).in_flight.ffn_input = args[0]


def forget_mask(module: nn.Module, args: tuple[Any, ...]) -> None:
    """Pre-hook of the last LayerNorm of a layer without adapter: no mask outlives the layer."""
    getattr(module, SITE).in_flight.mask = None


def check_mask(mask: Any) -> None:
    """Raises ValueError unless the mask is None or a padding mask [B, N] bool."""
    if mask is not None and (
        not isinstance(mask, Tensor) or mask.ndim != 2 or mask.dtype != torch.bool
    ):
        got = (
            f"{list(mask.shape)} {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        )
        raise ValueError(
            "pelt attention: expected attention_mask [B, N] with 1 for tokens and 0 for padding, "
            f"got {got}; masks for "
            "single query-key pairs are not supported by gates and prefixes (generate() makes one "
            "unless cache_implementation is left at its default)"
        )


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
    """transformers' attention function for "pelt".

    Args:
        query, key, value: [B, H, S, E] views; nothing is copied.
        attention_mask: [B, N] bool or None.

    Returns:
        out [B, S, H, E], and None; with output_attentions=True the weights [B, H, S, P + N], before
        dropout, with the prefix's columns in front, as a prefix in a cache gives them. A layer
        without a prefix has P = 0. They are computed beside the output, which stays what it is.

    Raises:
        ValueError: a mask that is not a padding mask.
    """
    site: LayerSite | None = getattr(module, SITE, None)
    if site is None and not isinstance(module.config, AttentionView):
        raise ValueError(
            "pelt attention: expected a layer prepared by get_pelt_model, got a "
            f"{type(module).__name__} without; "
            "the attention implementation 'pelt' cannot be chosen by hand"
        )
    check_mask(attention_mask)
    # The same for the kernel and for the weights of those who want to see them.
    causal = is_causal(module)
    how: dict[str, Any] = {"key_mask": attention_mask, "is_causal": causal, "scale": scaling}
    if site is None or site.prefix is None:
        # Without a site: a model of its own, built from the configuration of one with a method.
        out, weights = _base_attention(
            module, query, key, value, attention_mask, scaling, dropout, kwargs
        )
        if weights is None and wants_weights(module, kwargs):
            weights = attention_weights(query, key, **how)
        return out, weights
    gate = site.in_flight.prefix_gate
    site.in_flight.prefix_gate = None
    if site.has_prefix_gate and gate is None:
        raise RuntimeError(
            f"pelt attention: layer {site.layer} has a gated prefix but its query projection was "
            "not called before "
            "the attention"
        )
    out = site.prefix(
        site.prefix_row,
        query,
        key,
        value,
        gate=gate,
        dropout_p=dropout,
        **how,
    )
    weights = None
    if wants_weights(module, kwargs):
        weights = site.prefix.weights(site.prefix_row, query, key, gate=gate, **how)
    return out.transpose(1, 2), weights


def is_causal(module: nn.Module) -> bool:
    """Whether an attention module's queries see no later keys. Its keys may come from a cache, in
    which no prefix lies: that is seen at each step anew.
    """
    return bool(getattr(module, "is_causal", False))


def wants_weights(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether this call is asked for attention weights, as transformers decides it; then says once
    what that costs.
    """
    default = getattr(module.config, "output_attentions", False)
    if not kwargs.get("output_attentions", default):
        return False
    if not torch.compiler.is_compiling():
        logger.warning_once(
            "pelt attention: output_attentions=True: the weights [B, H, S, P + N] are computed by "
            "PyTorch beside the kernels, which never make them, prefix columns first; leave it out "
            "where speed and memory matter"
        )
    return True


def _base_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """The attention the base model was loaded with, and the mask in the form that one wants.

    eager adds its mask and sdpa reads a boolean one; both broadcast over queries, so [B, 1, 1, N]
    is enough where every query sees the same keys.
    """
    config: Any = module.config
    name = config.base_attention
    if name == "eager":
        function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if function is None:
            raise ValueError(
                f"pelt attention: expected {type(module).__module__} to define "
                "eager_attention_forward, got none"
            )
    else:
        function = AttentionInterface()[name]
    if mask is not None or is_causal(module):
        if mask is not None and name == "eager" and not is_causal(module):
            hidden = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device)
            mask = hidden.masked_fill(~mask, torch.finfo(query.dtype).min)[:, None, None, :]
        elif mask is not None and name == "sdpa" and not is_causal(module):
            mask = mask[:, None, None, :]
        else:
            mask = AttentionMaskInterface()[name](
                batch_size=query.shape[0],
                q_length=query.shape[2],
                kv_length=key.shape[2],
                q_offset=key.shape[2] - query.shape[2],
                kv_offset=0,
                mask_function=causal_mask_function
                if is_causal(module)
                else bidirectional_mask_function,
                attention_mask=mask,
                allow_is_causal_skip=False,
                dtype=query.dtype,
                config=module.config,
                device=query.device,
            )
    return function(module, query, key, value, mask, scaling=scaling, dropout=dropout, **kwargs)
