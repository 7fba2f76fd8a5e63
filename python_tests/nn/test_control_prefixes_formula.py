"""Control Prefixes written out as the paper's code computes them, in float64, against
`PrefixAttention`: three kinds of attention with parameters of their own, T5's position bias,
unscaled scores, outputs and every gradient.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pelt_kernels.nn import PrefixAttention

B, H, E, L, P, WIDTH, MID = 4, 2, 3, 2, 3, 6, 5
ATTRIBUTES = {"sources": (3, 2), "cats": (4, 1)}
LABELS = {"sources": [2, 0, 2, 1], "cats": [3, 1, 0, 3]}
# Of each kind of attention: queries, keys, whether it is causal, whether it has a position bias.
KINDS = {
    "encoder": (5, 5, False, True),
    "decoder": (4, 4, True, True),
    "cross": (4, 5, False, False),
}


def make(seed):
    torch.manual_seed(seed)
    prefix = PrefixAttention(
        L, P, H, E, mid=MID, width=WIDTH, attributes=ATTRIBUTES, dtype=torch.float64
    )
    for parameter in prefix.parameters():
        nn.init.normal_(parameter)
    return prefix


def written_out(p):
    """Keys and values of all layers [2·L, B, H, P_total, E]: every label of every attribute goes
    through the MLP for every sentence, then each sentence's slice is put in front of what is there.
    """
    up_weight = torch.cat([p[f"up_weight.{layer}"] for layer in range(L)])
    up_bias = torch.cat([p[f"up_bias.{layer}"] for layer in range(L)])

    def mlp(rows):
        hidden = torch.tanh(rows @ p["down.weight"].T + p["down.bias"])
        return hidden @ up_weight.T + up_bias

    out = mlp(p["embedding.weight"].expand(B, -1, -1))
    for name, (_, length) in ATTRIBUTES.items():
        of_all_labels = mlp(p[f"embedding_{name}"].expand(B, -1, -1))
        slices = [
            of_all_labels[b, y * length : (y + 1) * length] for b, y in enumerate(LABELS[name])
        ]
        out = torch.cat([torch.stack(slices), out], dim=1)
    return out.view(B, -1, 2 * L, H, E).permute(2, 0, 3, 1, 4)


def attention(q, k, v, prefix_k, prefix_v, mask, bias, is_causal):
    """K' = [prefix ; K], V' = [prefix ; V]; bias and masks are 0 on prefix columns."""
    s, n, total = q.shape[2], k.shape[2], prefix_k.shape[2]
    scores = q @ torch.cat([prefix_k, k], 2).transpose(2, 3)
    if bias is not None:
        scores = scores + torch.cat([torch.zeros(1, H, s, total, dtype=bias.dtype), bias], 3)
    hidden = torch.zeros(B, 1, s, n, dtype=torch.bool) | ~mask[:, None, None]
    if is_causal:
        hidden = hidden | torch.ones(s, n, dtype=torch.bool).triu(1)
    hidden = torch.cat([torch.zeros(B, 1, s, total, dtype=torch.bool), hidden], 3)
    scores = scores.masked_fill(hidden, -torch.inf)
    return torch.softmax(scores, -1) @ torch.cat([prefix_v, v], 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", range(L))
def test_outputs_and_gradients_are_the_papers(kind, layer):
    s, n, is_causal, has_bias = KINDS[kind]
    prefix = make(seed=list(KINDS).index(kind))
    q = torch.randn(B, H, s, E, dtype=torch.float64, requires_grad=True)
    k = torch.randn(B, H, n, E, dtype=torch.float64, requires_grad=True)
    v = torch.randn(B, H, n, E, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(1, H, s, n, dtype=torch.float64, requires_grad=True) if has_bias else None
    mask = torch.arange(n)[None] < torch.tensor([[n], [2], [n], [1]])
    labels = {name: torch.tensor(values) for name, values in LABELS.items()}
    named = dict(prefix.named_parameters())
    inputs = {"q": q, "k": k, "v": v, **({} if bias is None else {"bias": bias}), **named}
    weight = torch.randn(B, H, s, E, dtype=torch.float64)

    keys_values = written_out(named)
    assert keys_values.shape == (2 * L, B, H, 1 + 2 + P, E)
    expected = attention(
        q, k, v, keys_values[2 * layer], keys_values[2 * layer + 1], mask, bias, is_causal
    )
    gradients = torch.autograd.grad((expected * weight).sum(), list(inputs.values()))
    found = prefix(
        layer, q, k, v, labels=labels, key_mask=mask, bias=bias, is_causal=is_causal, scale=1.0
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    (found * weight).sum().backward()
    for (name, tensor), gradient in zip(inputs.items(), gradients, strict=True):
        mine = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        torch.testing.assert_close(mine, gradient, rtol=0, atol=1e-11, msg=name)
        is_of_another_layer = name.startswith("up_") and not name.endswith(str(layer))
        assert bool(gradient.any()) != is_of_another_layer, name
