"""The layers that encoder, decoder and text tower share.

All blocks follow one recipe (arXiv 2411.14402, Section 3.3): RMSNorm before attention and before SwiGLU, no biases.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import did_you_mean

EPS = 1e-5


def check_keys(spec: Iterable[str], known: Sequence[str], name: str) -> None:
    """Check the keys of the options of a part that messages call `name`.

    Raises:
        ValueError: If one is not accepted.
    """
    for key in spec:
        if key not in known:
            raise ValueError(f"{name}.{key} is not accepted; {did_you_mean(key, known)}")


def swiglu_hidden(width: int, multiple_of: int = 256) -> int:
    """Hidden width of SwiGLU: two thirds of four times `width`, rounded up to a multiple."""
    return multiple_of * math.ceil(int(2 * 4 * width / 3) / multiple_of)


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x²) + eps) * weight`, computed in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension; any shape, the type stays."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), EPS).to(x.dtype)


class Attention(nn.Module):
    """Multi-head self-attention without biases; queries, keys and values come from one product."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads: {heads} do not divide the width {width}")
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Attend; `x` `[B, N, D]`, `mask` bool `[B or 1, N or 1, N]`, true where a query (row) may attend."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mask = None if mask is None else mask[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.proj(out.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))` without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[..., D]` to `[..., D]`."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attention = RMSNorm(width), Attention(width, heads)
        self.norm2, self.ffn = RMSNorm(width), SwiGLU(width, hidden)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """Map `[B, N, D]` to `[B, N, D]`; see `Attention`."""
        x = x + self.attention(self.norm1(x), mask, causal)
        return x + self.ffn(self.norm2(x))


def blocks(width: int, depth: int, heads: int, multiple_of: int, hidden: int | None = None) -> nn.ModuleList:
    """Build `depth` blocks; all linear layers are Xavier-uniform."""
    hidden = swiglu_hidden(width, multiple_of) if hidden is None else hidden
    layers = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
    for layer in layers.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
    return layers


def head_linear(width: int, out: int, depth: int) -> nn.Linear:
    """Output layer without bias; truncated normal weights of variance `1 / (1 + depth) / width`."""
    layer = nn.Linear(width, out, bias=False)
    std = math.sqrt(1 / (1 + depth) / width) / 0.87962566  # the deviation that truncation at two leaves
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    return layer
