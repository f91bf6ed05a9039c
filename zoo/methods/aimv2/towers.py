"""Image and text embeddings of the contrastive objectives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.methods.aimv2.layers import RMSNorm, blocks, check_keys
from zoo.methods.aimv2.pooling import AttentionPool


class TextTower(nn.Module):
    """Causal text encoder of the contrastive stages; its feature is the output at the end-of-text token.

    Args:
        vocab_size: Tokens of the vocabulary.
        context_length: Longest caption.
        width: Channels.
        depth: Number of blocks.
        heads: Attention heads.
        eos_id: The token that ends a caption.
        multiple_of: See `Trunk`.
    """

    def __init__(
        self, vocab_size: int, context_length: int, width: int, depth: int, heads: int, eos_id: int, multiple_of: int
    ) -> None:
        super().__init__()
        self.eos_id = eos_id
        self.embedding = nn.Embedding(vocab_size, width)
        self.positions = nn.Parameter(torch.randn(context_length, width) * 0.01)
        self.blocks = blocks(width, depth, heads, multiple_of)
        self.norm = RMSNorm(width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        """Map tokens `[B, T]` to features `[B, D]`."""
        x = self.embedding(text) + self.positions[: text.shape[1]]
        for block in self.blocks:
            x = block(x, causal=True)
        end = (text == self.eos_id).int().argmax(dim=1)
        return self.norm(x[torch.arange(len(x), device=x.device), end])


class Towers(nn.Module):
    """Image and text embeddings of unit length from a trunk and a text tower.

    Args:
        width: Channels of the trunk.
        heads: Heads of the trunk, which the pool head shares.
        text: The text tower.
        text_width: Its channels.
        embed_dim: Dimension of the common space.
        pool: `mean` of the tokens (CLIP baseline) or `attention` (LiT).
    """

    def __init__(self, width: int, heads: int, text: TextTower, text_width: int, embed_dim: int, pool: str) -> None:
        super().__init__()
        self.pool = AttentionPool(width, heads) if pool == "attention" else None
        self.text = text
        self.image_projection = nn.Linear(width, embed_dim, bias=False)
        self.text_projection = nn.Linear(text_width, embed_dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def embed_images(self, tokens: Tensor) -> Tensor:
        """Embeddings `[B, d]` of the trunk's tokens `[B, I, D]`."""
        pooled = tokens.mean(dim=1) if self.pool is None else self.pool(tokens)
        return F.normalize(self.image_projection(pooled), dim=1)

    def embed_text(self, text: Tensor) -> Tensor:
        """Embeddings `[B, d]` of tokens `[B, T]`."""
        return F.normalize(self.text_projection(self.text(text)), dim=1)

    @property
    def scale(self) -> Tensor:
        """Factor of the cosines, 1 to 100."""
        return self.log_scale.float().clamp(0, math.log(100)).exp()


def build_towers(
    spec: Mapping[str, Any], width: int, heads: int, vocab_size: int, context_length: int, eos_id: int, pool: str
) -> Towers:
    """Build the towers of a trunk of `width` channels and `heads` heads.

    Args:
        spec: `width`, `depth`, `heads`, `multiple_of` of the text tower, and `embed_dim`.
        width: Channels of the trunk.
        heads: Its heads.
        vocab_size: Tokens of the vocabulary.
        context_length: Longest caption.
        eos_id: The token that ends a caption.
        pool: See `Towers`.

    Raises:
        ValueError: If a key or a value is not accepted.
    """
    check_keys(spec, ("width", "depth", "heads", "multiple_of", "embed_dim"), "text_tower")
    own = {"width": 768, "depth": 12, "heads": 6, "multiple_of": 256, "embed_dim": 768, **spec}
    embed_dim = own.pop("embed_dim")
    return Towers(
        width, heads, TextTower(vocab_size, context_length, eos_id=eos_id, **own), own["width"], embed_dim, pool
    )
