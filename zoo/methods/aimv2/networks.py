"""The encoder with prefix attention, the multimodal decoder, and the towers of the contrastive stages.

All blocks follow one recipe (arXiv 2411.14402, Section 3.3): RMSNorm before attention and before SwiGLU, no biases.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import did_you_mean

#: Encoders of the paper (Table 1); `base` is defined by the released code alone. The patch size is 14.
SIZES: dict[str, dict[str, int]] = {
    "base": {"width": 768, "depth": 12, "heads": 6},
    "large": {"width": 1024, "depth": 24, "heads": 8},
    "huge": {"width": 1536, "depth": 24, "heads": 12},
    "1B": {"width": 2048, "depth": 24, "heads": 16},
    "3B": {"width": 3072, "depth": 24, "heads": 24},
}
EPS = 1e-5


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
        """Attend; `x` `[B, N, D]`, `mask` bool `[B or 1, N, N]`, true where a query (row) may attend."""
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


def sincos_positions(rows: int, columns: int, width: int, device: torch.device | None = None) -> Tensor:
    """Fixed positions of the native-resolution encoder, float32 `[rows * columns, width]`.

    The first half of the channels encodes the column, the second the row; each half is `[sin | cos]` with frequencies
    `10000^(-k / (width / 4))`, as in the released code.
    """
    quarter = width // 4
    omega = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64, device=device) / quarter)

    def axis(n: int) -> Tensor:
        angle = torch.arange(n, dtype=torch.float64, device=device)[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    column = axis(columns)[None].expand(rows, -1, -1)
    row = axis(rows)[:, None].expand(-1, columns, -1)
    return torch.cat([column, row], dim=2).flatten(0, 1).float()


def resize_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Interpolate positions `[h w, D]` of a grid to another one, bicubic; the same tensor if the grids are equal."""
    if old == new:
        return positions
    grid = positions.float().unflatten(0, old).permute(2, 0, 1)[None]
    grid = F.interpolate(grid, size=new, mode="bicubic", antialias=True)
    return grid[0].flatten(1).T.to(positions.dtype)


class Trunk(nn.Module):
    """The vision encoder.

    Args:
        image_size: Height and width of the images that learned positions are made for.
        in_channels: Channels of the images.
        patch_size: Side of a patch in pixels.
        width: Channels `D` of a token.
        depth: Number of blocks.
        heads: Attention heads.
        pos_embed: `absolute` (learned) or `sincos` (fixed, any grid).
        multiple_of: The hidden width of SwiGLU is a multiple of it.
        hidden: Hidden width of SwiGLU; None for the rule.

    Raises:
        ValueError: If the numbers do not fit together.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        pos_embed: str = "absolute",
        multiple_of: int = 256,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        if image_size % patch_size or image_size < 2 * patch_size:
            raise ValueError(
                f"patch_size: {patch_size} does not divide the image size {image_size} into several patches"
            )
        if pos_embed not in ("absolute", "sincos"):
            raise ValueError(f"pos_embed: {pos_embed!r} is not accepted; accepted: absolute, sincos")
        if pos_embed == "sincos" and width % 4:
            raise ValueError(f"width: {width} is not a multiple of 4, as pos_embed: sincos needs")
        self.patch_size, self.width, self.heads, self.in_channels = patch_size, width, heads, in_channels
        self.grid = (image_size // patch_size, image_size // patch_size)
        self.num_patches = self.grid[0] * self.grid[1]
        self.patch_embed = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.patch_embed.weight.detach().view(width, -1))
        nn.init.zeros_(self.patch_embed.bias)  # type: ignore[arg-type]
        self.patch_norm = RMSNorm(width)
        self.positions = nn.Parameter(torch.randn(self.num_patches, width) * 0.02) if pos_embed == "absolute" else None
        self.blocks = blocks(width, depth, heads, multiple_of, hidden)
        self.norm = RMSNorm(width)

    def embed(self, images: Tensor) -> Tensor:
        """Tokens `[B, I, D]` of images `[B, c, H, W]` before the first block.

        Raises:
            ValueError: If the patch size does not divide the images.
        """
        height, width = images.shape[2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"images of {height} x {width} pixels cannot be cut into patches of {self.patch_size}")
        x = self.patch_norm(self.patch_embed(images).flatten(2).transpose(1, 2))
        grid = (height // self.patch_size, width // self.patch_size)
        if self.positions is None:
            return x + sincos_positions(*grid, self.width, x.device).to(x.dtype)
        return x + resize_positions(self.positions, self.grid, grid)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        """Features `[B, I, D]` of images `[B, c, H, W]`; evaluation takes no mask."""
        x = self.embed(images)
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)

    def layers(self, images: Tensor, count: int) -> Tensor:
        """Mean over the outputs of `count` blocks, evenly spread and the last among them, normalised; `[B, I, D]`.

        AIMv1's protocol (arXiv 2401.08541, Section 4) probes the mean of six; `count` 1 is the last alone.
        """
        depth = len(self.blocks)
        chosen = {round(depth * (i + 1) / count) for i in range(count)}
        x, outputs = self.embed(images), []
        for number, block in enumerate(self.blocks, start=1):
            x = block(x)
            if number in chosen:
                outputs.append(self.norm(x))
        return torch.stack(outputs).mean(dim=0)


def build_trunk(spec: Mapping[str, Any], image_size: int, in_channels: int) -> Trunk:
    """Build a trunk from `size` (a name of `SIZES`) and arguments of `Trunk` that take precedence.

    Raises:
        ValueError: If a key or a value is not accepted.
    """
    values = {"patch_size": 14, **spec}
    size = values.pop("size", None)
    if size is not None:
        if size not in SIZES:
            raise ValueError(f"trunk.size: {size!r} is not accepted; {did_you_mean(str(size), SIZES)}")
        values = {**SIZES[size], **values}
    known = ("patch_size", "width", "depth", "heads", "pos_embed", "multiple_of", "hidden")
    for key in values:
        if key not in known:
            raise ValueError(f"trunk.{key} is not accepted; {did_you_mean(key, ('size', *known))}")
    missing = [key for key in ("width", "depth", "heads") if key not in values]
    if missing:
        raise ValueError(f"trunk: {', '.join(missing)} missing; accepted: a size ({', '.join(SIZES)}) or all three")
    try:
        return Trunk(image_size, in_channels, **values)
    except ValueError as error:
        raise ValueError(f"trunk.{error}") from error


def head_linear(width: int, out: int, depth: int) -> nn.Linear:
    """Output layer without bias; truncated normal weights of variance `1 / (1 + depth) / width`."""
    layer = nn.Linear(width, out, bias=False)
    std = math.sqrt(1 / (1 + depth) / width) / 0.87962566  # the deviation that truncation at two leaves
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    return layer


class Decoder(nn.Module):
    """The multimodal decoder: one causal transformer over the image's features and the caption.

    Args:
        in_width: Channels of the encoder.
        width: Channels of the decoder.
        depth: Number of blocks.
        heads: Attention heads.
        patch_values: Values `P` of a patch that the image part predicts; 0 for no pixel head.
        vocab_size: Tokens `V` that the text part predicts; 0 for no text at all.
        context_length: Longest caption.
        multiple_of: See `Trunk`.
        order: `image_text` or `text_image`: what the decoder reads first.
        pad_id: Padding of the captions.
    """

    def __init__(
        self,
        in_width: int,
        width: int,
        depth: int,
        heads: int,
        patch_values: int,
        vocab_size: int,
        context_length: int,
        multiple_of: int = 256,
        order: str = "image_text",
        pad_id: int = 0,
    ) -> None:
        super().__init__()
        self.order, self.pad_id = order, pad_id
        self.project = nn.Linear(in_width, width)
        self.blocks = blocks(width, depth, heads, multiple_of)
        self.norm = RMSNorm(width)
        self.pixel_head = head_linear(width, patch_values, depth) if patch_values else None
        self.text_head = head_linear(width, vocab_size, depth) if vocab_size else None
        if vocab_size:
            self.embedding = nn.Embedding(vocab_size, width)
            nn.init.normal_(self.embedding.weight, std=0.02)
            self.start = nn.Parameter(torch.randn(width) * 0.02)
            self.positions = nn.Parameter(torch.randn(context_length + 1, width) * 0.01)

    def text_tokens(self, text: Tensor) -> Tensor:
        """Start token and embedded tokens with their positions, `[B, N + 1, D]`, of tokens `[B, N]`."""
        start = self.start.expand(len(text), 1, -1)
        return torch.cat([start, self.embedding(text)], dim=1) + self.positions[: text.shape[1] + 1]

    def forward(self, features: Tensor, text: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Predict patches and tokens.

        Args:
            features: Output of the encoder `[B, I, D]`.
            text: Tokens, int64 `[B, T]`, padded on the right; None reads the image alone.

        Returns:
            Predictions at every patch `[B, I, P]` and logits of each token `[B, T, V]`; None for a head that is not
            there.
        """
        image = self.project(features)
        count = image.shape[1]
        mask = None
        if text is None or self.text_head is None:
            x = image
        elif self.order == "image_text":
            # the last token is not read: it has nothing to predict and comes after all others
            x = torch.cat([image, self.text_tokens(text[:, :-1])], dim=1)
        else:
            x = torch.cat([self.text_tokens(text), image], dim=1)
            mask = self.text_first_mask(text, count)
        for block in self.blocks:
            x = block(x, mask, causal=mask is None)
        x = self.norm(x)
        if text is None or self.text_head is None:
            seen, said = x, None
        elif self.order == "image_text":
            seen, said = x[:, :count], x[:, count:]
        else:
            seen, said = x[:, text.shape[1] + 1 :], x[:, : text.shape[1]]
        pixels = None if self.pixel_head is None else self.pixel_head(seen)
        return pixels, None if said is None or self.text_head is None else self.text_head(said)

    def text_first_mask(self, text: Tensor, patches: int) -> Tensor:
        """Causal mask `[B, N, N]` over start, caption and patches in which padding is not seen."""
        real = F.pad(text != self.pad_id, (1, patches), value=True)
        return real[:, None] & torch.ones(real.shape[1], real.shape[1], dtype=torch.bool, device=text.device).tril()


class ResidualMLP(nn.Module):
    """AIMv1's head: residual MLP blocks without attention, LayerNorm, and a linear layer (arXiv 2401.08541).

    Args:
        in_width: Channels of the encoder.
        patch_values: Values `P` of a patch.
        width: Channels of the head.
        depth: Number of blocks.
    """

    def __init__(self, in_width: int, patch_values: int, width: int, depth: int) -> None:
        super().__init__()
        self.project = nn.Linear(in_width, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(width, eps=EPS),
                nn.Linear(width, 4 * width, bias=False),
                nn.GELU(),
                nn.Linear(4 * width, width, bias=False),
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.out = head_linear(width, patch_values, depth)

    def forward(self, features: Tensor) -> Tensor:
        """Map `[B, I, D]` to predictions at every patch `[B, I, P]`."""
        x = self.project(features)
        for block in self.blocks:
            x = x + block(x)
        return self.out(self.norm(x))


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
