"""One learned query over the tokens of an image: the pool of LiT, and the attentive probe."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(query: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """One query `[D]` over tokens: keys and values `[B, N, D]`; `[B, D]`."""
    k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (keys, values))
    q = query.to(k.dtype).view(1, heads, 1, -1).expand(len(k), -1, -1, -1)
    return F.scaled_dot_product_attention(q, k, v).flatten(1)


class AttentionPool(nn.Module):
    """Attention-pool head of the LiT model: one learned query, no query projection, output with bias."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(width) * 0.02)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map `[B, N, D]` to `[B, D]`."""
        return self.proj(attend(self.query, self.key(tokens), self.value(tokens), self.heads))


class AttentiveClassifier(nn.Module):
    """The attentive probe of the released code: batch norm without weights, one query, one linear layer.

    Args:
        width: Channels of the tokens.
        heads: Attention heads.
        num_classes: Number of classes.
    """

    def __init__(self, width: int, heads: int, num_classes: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.BatchNorm1d(width, affine=False, eps=1e-6)
        self.query = nn.Parameter(torch.randn(width) * 0.02)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.linear = nn.Linear(width, num_classes, bias=False)

    def normalise(self, tokens: Tensor) -> Tensor:
        """Batch norm over images and tokens, `[B, N, D]`."""
        return self.norm(tokens.flatten(0, 1)).view_as(tokens)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map `[B, N, D]` to logits `[B, C]`."""
        x = self.normalise(tokens)
        return self.linear(attend(self.query, self.key(x), self.value(x), self.heads))

    def attention(self, tokens: Tensor) -> Tensor:
        """Weights of the query, the mean over heads, `[B, N]`."""
        keys = self.key(self.normalise(tokens)).unflatten(2, (self.heads, -1))
        query = self.query.view(self.heads, -1)
        return torch.einsum("bnhd,hd->bhn", keys, query).div(math.sqrt(query.shape[1])).softmax(dim=2).mean(dim=1)
