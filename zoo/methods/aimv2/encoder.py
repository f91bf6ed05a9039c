"""The vision encoder, in the sizes of the paper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import did_you_mean
from zoo.methods.aimv2.layers import RMSNorm, blocks, check_keys
from zoo.methods.aimv2.losses import real_patches
from zoo.methods.aimv2.positions import grid_positions, resize_positions, sincos_positions

#: Encoders of the paper (Table 1); `base` is defined by the released code alone. The patch size is 14.
SIZES: dict[str, dict[str, int]] = {
    "base": {"width": 768, "depth": 12, "heads": 6},
    "large": {"width": 1024, "depth": 24, "heads": 8},
    "huge": {"width": 1536, "depth": 24, "heads": 12},
    "1B": {"width": 2048, "depth": 24, "heads": 16},
    "3B": {"width": 3072, "depth": 24, "heads": 24},
}


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

    def embed(self, images: Tensor, grid: Tensor | None = None) -> Tensor:
        """Tokens `[B, I, D]` before the first block; see `forward`.

        Raises:
            ValueError: If the patch size does not divide the images, or if learned positions meet images of many grids.
        """
        if grid is not None:
            return self.embed_patches(images, grid)
        height, width = images.shape[2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"images of {height} x {width} pixels cannot be cut into patches of {self.patch_size}")
        x = self.patch_norm(self.patch_embed(images).flatten(2).transpose(1, 2))
        size = (height // self.patch_size, width // self.patch_size)
        if self.positions is None:
            return x + sincos_positions(*size, self.width, x.device).to(x.dtype)
        return x + resize_positions(self.positions, self.grid, size)

    def embed_patches(self, patches: Tensor, grid: Tensor) -> Tensor:
        """Tokens `[B, I, D]` of sequences of patches `[B, I, P]` whose images have the grids `[B, 2]`."""
        if self.positions is not None:
            raise ValueError("trunk.pos_embed: 'absolute' is made for images of one size; accepted: sincos")
        p = self.patch_size
        squares = patches.flatten(0, 1).unflatten(1, (p, p, self.in_channels)).permute(0, 3, 1, 2)
        x = self.patch_norm(self.patch_embed(squares).view(*patches.shape[:2], self.width))
        return x + grid_positions(grid, patches.shape[1], self.width).to(x.dtype)

    def forward(self, images: Tensor, mask: Tensor | None = None, grid: Tensor | None = None) -> Tensor:
        """Encode images of one size, or of many sizes as sequences of patches.

        Args:
            images: `[B, c, H, W]`; with `grid` patches `[B, I, P]` in raster order, zeros after the last one.
            mask: bool `[B, I, I]`, true where a query (row) may attend. Evaluation has none: all patches see one
                another, and none sees the zeros.
            grid: Rows and columns of patches of each image, int64 `[B, 2]`.

        Returns:
            Features `[B, I, D]`; those of zeros mean nothing.
        """
        x = self.embed(images, grid)
        if grid is not None and mask is None:
            mask = real_patches(grid, x.shape[1])[:, None]
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
    known = ("size", "patch_size", "width", "depth", "heads", "pos_embed", "multiple_of", "hidden")
    check_keys(values, known, "trunk")
    missing = [key for key in ("width", "depth", "heads") if key not in values]
    if missing:
        raise ValueError(f"trunk: {', '.join(missing)} missing; accepted: a size ({', '.join(SIZES)}) or all three")
    try:
        return Trunk(image_size, in_channels, **values)
    except ValueError as error:
        raise ValueError(f"trunk.{error}") from error
