"""The attention of BERT, RoBERTa and XLM-R in the library ``adapters`` on `prefix_attention`.

The library computes the prefixes of all layers before the model's forward, once for each sentence
of the batch, and each attention joins its own to the tokens' keys. Here they are computed once for
the batch, and the attention reads them as they are. Without a prefix it is PyTorch's, as the
library's is, or on a CPU the kernels' where they take less time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from adapters.context import ForwardContext
from adapters.methods.prefix_tuning import FlatPrefixTuning, PrefixTuning
from adapters.models.bert.modeling_bert import BertSdpaSelfAttentionWithAdapters
from adapters.models.roberta.modeling_roberta import RobertaSdpaSelfAttentionWithAdapters
from adapters.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaSdpaSelfAttentionWithAdapters
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from ..ops import Prefix, prefix_attention
from ..ops._arguments import is_recorded
from ..ops.prefix_attention.without_prefix import SeenKeys, attend, is_for_cpu, pays
from .adapters_layers import names_in
from .replacement import Accelerated, library_class


class AcceleratedPrefixTuning(Accelerated, PrefixTuning):
    """The library's prefixes, by their network, for the batch as one."""

    def forward(self, batch_size: int) -> Any:
        """For each layer keys and values [2, batch_size, H, P, E]."""
        return _for_the_batch(self, PrefixTuning, batch_size)


class AcceleratedFlatPrefixTuning(Accelerated, FlatPrefixTuning):
    """The library's prefixes, as a table, for the batch as one."""

    def forward(self, batch_size: int) -> Any:
        """For each layer keys and values [2, batch_size, H, P, E]."""
        return _for_the_batch(self, FlatPrefixTuning, batch_size)


def _for_the_batch(module: Any, kind: Any, batch_size: int) -> Any:
    if module.dropout.p and module.dropout.training:
        return kind.forward(module, batch_size)  # a mask of its own for each sentence
    return tuple(each.expand(-1, batch_size, -1, -1, -1) for each in kind.forward(module, 1))


class _Own(NamedTuple):
    """The prefix of one attention in one call."""

    prefix: Prefix
    gate: Tensor | None


def _seen_keys(mask: Tensor | None) -> SeenKeys | None:
    """What an additive mask [B, 1, S, N] lets queries see, where it is on a CPU and holds the zeros
    and lowest numbers of padding: keys that none sees are not visited then. None for any other.
    """
    if mask is None:
        return SeenKeys(None, False)
    if mask.device.type != "cpu" or is_recorded() or mask.ndim != 4 or mask.shape[1] != 1:
        return None
    rows = mask[:, 0]
    first = rows[:, 0]
    is_seen = first == 0
    is_padding = (
        (is_seen | (first == torch.finfo(mask.dtype).min)).all()
        and is_seen.any(-1).all()  # where all is hidden, the library sees all
        and torch.equal(rows, first[:, None].expand_as(rows))
    )
    return SeenKeys(is_seen, False) if is_padding else None


class _SelfAttention(Accelerated):
    """An attention whose prefixes are not joined to its keys."""

    prefix_tuning: Any

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        past_key_values: Any = None,
        output_attentions: bool | None = False,
        cache_position: Tensor | None = None,
    ) -> Any:
        """As the library's: (out [B, S, D], None)."""
        module: Any = self
        others = (head_mask, encoder_hidden_states, past_key_values)
        is_plain = all(each is None for each in others) and not output_attentions
        if module.is_decoder or module.position_embedding_type != "absolute":
            is_plain = False
        has_prompt = getattr(ForwardContext.get_context(), "prompt_tokens_length", None)
        if hidden_states.ndim != 3 or has_prompt:
            is_plain = False
        own = self._own(hidden_states) if is_plain else None
        if own is None and not (is_plain and self._has_none()):
            kind: Any = library_class(module)
            return kind.forward(
                self,
                hidden_states,
                attention_mask,
                *others,
                output_attentions,
                cache_position,
            )
        batch, rows = hidden_states.shape[:2]
        shape = (batch, rows, module.num_attention_heads, module.attention_head_size)
        q, k, v = (
            linear(hidden_states).view(shape).transpose(1, 2)
            for linear in (module.query, module.key, module.value)
        )
        dropout = module.dropout_prob if module.training else 0.0
        if own is None:
            out = self._without_prefix(q, k, v, attention_mask, dropout)
        else:
            seen = _seen_keys(attention_mask)
            found = prefix_attention(
                q,
                k,
                v,
                [own.prefix],
                gate=own.gate,
                bias=attention_mask if seen is None else None,
                key_mask=None if seen is None else seen.key_mask,
                dropout_p=dropout,
                backend=self.pelt_backend,
            )
            assert isinstance(found, Tensor)
            out = found.transpose(1, 2)
        return out.reshape(batch, rows, module.all_head_size), None

    def _without_prefix(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float
    ) -> Tensor:
        """The attention to the tokens, [B, S, H, E]."""
        by_kernels = is_for_cpu(self.pelt_backend) and pays(q, k, v, dropout)
        seen = _seen_keys(mask) if by_kernels else None
        if seen is not None:
            return attend(q, k, v, seen, None, dropout)
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return out.transpose(1, 2)

    def _has_none(self) -> bool:
        """Whether no prefix is active here, and each text is there once."""
        layer = self.prefix_tuning
        setup = layer.get_active_setup()
        if setup is None:
            return True
        has_one = any(name in layer.prefixes for name in setup.flatten())
        return setup.parallel_channels == 1 and not has_one

    def _own(self, hidden_states: Tensor) -> _Own | None:
        """The prefix, where there is one that is the same for the batch."""
        layer = self.prefix_tuning
        names = names_in(layer.get_active_setup(), layer.prefixes)
        context = ForwardContext.get_context()
        if len(names) != 1 or context is None:
            return None
        (name,) = names
        keys, values = context.prefix_states[name][layer.location_key][layer.prefixes[name]]
        batch = len(hidden_states)
        is_shared = batch == 1 or (keys.stride(0) == 0 and values.stride(0) == 0)
        if not is_shared or len(keys) != batch:
            return None
        gate = None
        if name in layer.prefix_gates:
            if layer.prefix_gates[name].out_features != 1:
                return None
            pooled = torch.sigmoid(layer.prefix_gates[name](hidden_states)).mean(dim=1)
            layer._store_gating_score(name, pooled)
            gate = pooled[:, 0]
        return _Own(Prefix(keys[0].transpose(0, 1), values[0].transpose(0, 1)), gate)


class AcceleratedBertAttention(_SelfAttention, BertSdpaSelfAttentionWithAdapters):
    """BERT's."""


class AcceleratedRobertaAttention(_SelfAttention, RobertaSdpaSelfAttentionWithAdapters):
    """RoBERTa's."""


class AcceleratedXLMRobertaAttention(_SelfAttention, XLMRobertaSdpaSelfAttentionWithAdapters):
    """XLM-R's."""


ATTENTIONS: dict[type[nn.Module], type[nn.Module]] = {
    kind.__bases__[-1]: kind
    for kind in (
        AcceleratedBertAttention,
        AcceleratedRobertaAttention,
        AcceleratedXLMRobertaAttention,
    )
}
POOLS: dict[type[nn.Module], type[nn.Module]] = {
    PrefixTuning: AcceleratedPrefixTuning,
    FlatPrefixTuning: AcceleratedFlatPrefixTuning,
}
