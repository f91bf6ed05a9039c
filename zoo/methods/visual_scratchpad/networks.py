"""A vision transformer that reads one frame, or a history of frames, and draws the next one."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Prediction(NamedTuple):
    """What a network says about frames; parts that its mode does not have are None.

    Args:
        frame: Next frame, `[..., 3, H, W]`, not clamped.
        halt: Logit of having finished, `[...]`.
        label: Logit of the answer yes, `[...]`.
    """

    frame: Tensor | None
    halt: Tensor | None
    label: Tensor

    def at(self, index: int) -> Prediction:
        """Select frame `index` of a prediction for frames `[B, F, ...]`."""
        frame, halt = (None if part is None else part[:, index] for part in (self.frame, self.halt))
        return Prediction(frame, halt, self.label[:, index])


def sincos_positions(grid: int, width: int) -> Tensor:
    """Fixed 2D positions `[grid * grid, width]`: sines and cosines of row and column, half of the width each.

    Raises:
        ValueError: If the width is not a multiple of four.
    """
    if width % 4:
        raise ValueError(f"width={width}: expected a multiple of 4, for sines and cosines of rows and columns")
    frequency = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)
    row = axis[:, None].expand(grid, grid, -1)
    return torch.cat([row, row.transpose(0, 1)], dim=-1).reshape(grid * grid, width).float()


class OverlapPatchEmbed(nn.Module):
    """Linear map of each patch and `overlap` pixels around it, zeros beyond the border; takes the place of timm's.

    Args:
        img_size: Height and width of the image.
        patch_size: Side of a patch.
        in_chans: Channels of the image.
        embed_dim: Width of the tokens.
        overlap: Pixels seen beyond each side of the patch.
    """

    def __init__(
        self, img_size: int, patch_size: int, in_chans: int = 3, embed_dim: int = 64, overlap: int = 0, **_: Any
    ) -> None:
        super().__init__()
        self.patch_size, self.grid_size = (patch_size, patch_size), (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size + 2 * overlap, stride=patch_size, padding=overlap)

    def forward(self, image: Tensor) -> Tensor:
        """Map `[B, 3, H, W]` to `[B, N, D]`."""
        return self.proj(image).flatten(2).transpose(1, 2)


def build_vit(
    backbone: str, image_size: int, patch_size: int, overlap: int, width: int, depth: int, heads: int, pretrained: bool
) -> nn.Module:
    """Build the backbone: `vit` of the given sizes with fixed positions, or any vision transformer of timm by name.

    Raises:
        ValueError: If the name is unknown to timm or is no plain vision transformer with a class token.
    """
    import timm
    from timm.models.vision_transformer import VisionTransformer

    if backbone == "vit":
        vit = VisionTransformer(
            img_size=image_size,
            patch_size=patch_size,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            num_classes=0,
            weight_init="jax",  # Xavier: 0.02 is too small for narrow networks
            embed_layer=partial(OverlapPatchEmbed, overlap=overlap),  # type: ignore[arg-type]
        )
        positions = torch.cat([torch.zeros(1, width), sincos_positions(image_size // patch_size, width)])
        vit.pos_embed = nn.Parameter(positions[None], requires_grad=False)
        return vit
    if not timm.models.is_model_in_modules(backbone, ["vision_transformer"]):
        raise ValueError(f"backbone={backbone!r}: expected 'vit', 'cnn' (mode none) or a vision transformer of timm")
    model = timm.create_model(
        backbone, pretrained=pretrained, num_classes=0, img_size=image_size, patch_size=patch_size
    )
    if not isinstance(model, VisionTransformer) or model.cls_token is None:
        raise ValueError(f"backbone={backbone!r}: expected a plain vision transformer with a class token")
    return model


def block_causal_mask(frames: int, tokens: int, device: torch.device) -> Tensor:
    """Mask `[frames * tokens, frames * tokens]`, true where a token may look: at its own frame and at earlier ones."""
    frame = torch.arange(frames, device=device).repeat_interleave(tokens)
    return frame[:, None] >= frame[None]


class ScratchpadViT(nn.Module):
    """Vision transformer with a head that draws, one that says when to stop, and one that answers.

    The frame head is one linear layer on each patch token; the other two read the class token.

    Args:
        vit: Backbone from timm with a class token.
        patch_size: Side of a patch in pixels.
        draws: Whether there is a frame head.
        halts: Whether there is a halt head.
        history: Most frames that are read together; 1 for networks that see one frame.
        iterations: How often the blocks are applied, with the same weights; the image's tokens are added each time.
    """

    def __init__(
        self, vit: nn.Module, patch_size: int, draws: bool, halts: bool, history: int = 1, iterations: int = 1
    ) -> None:
        super().__init__()
        self.vit: Any
        self.vit = vit
        self.patch_size, self.iterations = patch_size, iterations
        width: int = self.vit.embed_dim
        self.frame_head = nn.Linear(width, 3 * patch_size**2) if draws else None
        self.halt_head = nn.Linear(width, 1) if halts else None
        self.label_head = nn.Linear(width, 1)
        self.frame_embedding = nn.Parameter(torch.zeros(history, 1, width)) if history > 1 else None
        if self.frame_embedding is not None:
            nn.init.trunc_normal_(self.frame_embedding, std=0.02)

    def forward(self, image: Tensor) -> Prediction:
        """Read one frame `[B, 3, H, W]`; nothing says which frame of the sketch it is."""
        return self.read_history(image[:, None]).at(0)

    def read_history(self, frames: Tensor) -> Prediction:
        """Read `F` frames `[B, F, 3, H, W]`; the prediction at each of them rests on it and the ones before.

        Returns:
            Frames `[B, F, 3, H, W]`, halt and label logits `[B, F]`.
        """
        batch, count, _, height, width = frames.shape
        tokens = self.vit.norm_pre(self.vit._pos_embed(self.vit.patch_embed(frames.flatten(0, 1))))
        per_frame = tokens.shape[1]
        tokens = tokens.reshape(batch, count, per_frame, -1)
        if self.frame_embedding is not None:
            tokens = tokens + self.frame_embedding[:count]
        tokens = tokens.reshape(batch, count * per_frame, -1)
        mask = block_causal_mask(count, per_frame, tokens.device) if count > 1 else None
        hidden = tokens
        for iteration in range(self.iterations):
            if iteration:
                hidden = hidden + tokens
            for block in self.vit.blocks:
                hidden = block(hidden) if mask is None else block(hidden, attn_mask=mask)
        hidden = self.vit.norm(hidden).reshape(batch, count, per_frame, -1)
        first = hidden[:, :, 0]
        drawn = None
        if self.frame_head is not None:
            patches = hidden[:, :, self.vit.num_prefix_tokens :]
            drawn = unpatchify(self.frame_head(patches), height, width, self.patch_size)
        halt = None if self.halt_head is None else self.halt_head(first)[..., 0]
        return Prediction(drawn, halt, self.label_head(first)[..., 0])


def unpatchify(patches: Tensor, height: int, width: int, patch_size: int) -> Tensor:
    """Put patches `[..., N, 3 * p * p]`, in row-major order, together to an image `[..., 3, height, width]`."""
    lead, p = patches.shape[:-2], patch_size
    grid = patches.reshape(*lead, height // p, width // p, 3, p, p)
    rows = len(lead)  # ... row column colour y x -> ... colour row y column x
    order = (*range(rows), rows + 2, rows, rows + 3, rows + 1, rows + 4)
    return grid.permute(order).reshape(*lead, 3, height, width)


class ConvLabeller(nn.Module):
    """Convolutional baseline without scratchpad: `depth` stages of two 3x3 convolutions, each halving the size.

    Args:
        width: Channels of the first stage, doubled at most twice.
        depth: Number of stages.
    """

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for stage in range(depth):
            out = width * 2 ** min(stage, 2)
            for inputs in (channels, out):
                layers += [nn.Conv2d(inputs, out, 3, padding=1, bias=False), nn.GroupNorm(min(8, out), out), nn.GELU()]
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            channels = out
        self.features = nn.Sequential(*layers)
        self.label_head = nn.Linear(channels, 1)

    def forward(self, image: Tensor) -> Prediction:
        """Answer for images `[B, 3, H, W]`."""
        return Prediction(None, None, self.label_head(self.features(image).mean(dim=(2, 3)))[:, 0])
