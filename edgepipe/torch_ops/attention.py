"""Attention of plain linear layers, in the place of ``nn.MultiheadAttention``.

``nn.MultiheadAttention`` packs queries, keys and values into one parameter as wide as its input, so
it cannot have fewer heads. The same computation from four linear layers can.
"""

from __future__ import annotations

import torch
from torch import nn


class Attention(nn.Module):
    """``softmax(q k^T / sqrt(head_dim) + mask) v`` (Vaswani et al. 2017, eq. 1), with the arguments
    and results of ``nn.MultiheadAttention`` for batches.

    ``layer`` is the one it replaces, whose weights it has. Raises ValueError for one with learned or
    zero extra keys (``add_bias_kv``, ``add_zero_attn``).
    """

    def __init__(self, layer: nn.MultiheadAttention) -> None:
        super().__init__()
        if layer.bias_k is not None or layer.add_zero_attn:
            raise ValueError("attention with add_bias_kv or add_zero_attn")
        self.num_heads, self.head_dim = layer.num_heads, layer.head_dim
        self.batch_first, self.dropout = layer.batch_first, layer.dropout
        # nn.TransformerEncoderLayer asks for these to decide whether it may go round this forward
        self.in_proj_bias, self._qkv_same_embed_dim = None, False
        weights: tuple[torch.Tensor, ...]
        if layer.in_proj_weight is not None:
            weights = layer.in_proj_weight.chunk(3)
        else:
            weights = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
        biases = (None,) * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
        self.query, self.key, self.value = map(_linear, weights, biases)
        self.out_proj = _linear(layer.out_proj.weight, layer.out_proj.bias)
        self.train(layer.training)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,  # a hint: the mask itself is always given
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        given = (self.query(query), self.key(key), self.value(value))
        if not self.batch_first:  # (L, N, E) -> (N, L, E)
            given = tuple(t.transpose(0, 1) for t in given)
        # (N, L, E) -> (N, heads, L, head_dim)
        q, k, v = (t.unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2) for t in given)
        scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
        if attn_mask is not None:
            scores = scores + _additive(attn_mask, scores)
        if key_padding_mask is not None:  # (N, S) -> (N, 1, 1, S)
            scores = scores + _additive(key_padding_mask, scores)[:, None, None]
        weights = scores.softmax(-1)
        y = nn.functional.dropout(weights, self.dropout, self.training) @ v
        y = y.transpose(1, 2).flatten(2)  # (N, heads, L, head_dim) -> (N, L, heads * head_dim)
        y = self.out_proj(y if self.batch_first else y.transpose(0, 1))
        if not need_weights:
            return y, None
        return y, weights.mean(1) if average_attn_weights else weights


def _additive(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A mask of which True means "not this one" as numbers to add."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)
    return mask


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    layer = nn.Linear(1, 1, bias=bias is not None, device="meta")
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().clone())
    return layer
