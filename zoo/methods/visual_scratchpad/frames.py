"""Frames of a sketch as tensors: from bytes to images, back to the palette, and how well two frames agree."""

from __future__ import annotations

import torch
from torch import Tensor

#: Palette index of the colour that the solution is drawn in.
BLUE = 2


def frame_indices(canvas: Tensor, arrival: Tensor, t: Tensor) -> Tensor:
    """Palette indices of frame `t`.

    Args:
        canvas: Palette indices of the question, uint8 `[B, H, W]`.
        arrival: Frame in which a pixel turns blue, uint8 `[B, H, W]`, 255 where it does not.
        t: Number of the frame, int64 `[B]`; frames after the last one equal it.

    Returns:
        uint8 `[B, H, W]`.
    """
    return torch.where(arrival <= t.clamp(max=254)[:, None, None], BLUE, canvas)


def to_image(indices: Tensor, palette: Tensor) -> Tensor:
    """Turn palette indices `[..., H, W]` into colours `[..., 3, H, W]` of the palette `[K, 3]`."""
    return palette[indices.long()].movedim(-1, -3)


def nearest(image: Tensor, palette: Tensor) -> Tensor:
    """Palette indices `[..., H, W]` of the colours nearest to an image `[..., 3, H, W]`, by Euclidean distance."""
    # |x - c|^2 without |x|^2, which is the same for all colours
    score = torch.einsum("...chw,kc->...khw", image, palette) - palette.square().sum(1)[:, None, None] / 2
    return score.argmax(dim=-3)


def next_input(frame: Tensor, palette: Tensor, snap: bool) -> Tensor:
    """What the network sees after it drew `frame` `[..., 3, H, W]`: clamped to [0, 1], on the palette if `snap`."""
    frame = frame.detach()
    return to_image(nearest(frame, palette), palette) if snap else frame.clamp(0, 1)


def change_iou(now: Tensor, predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Agreement of a predicted frame with the true one on the pixels that change.

    Args:
        now: Palette indices of the frame before, `[B, H, W]`.
        predicted: Palette indices of the prediction.
        target: Palette indices of the true next frame.

    Returns:
        Number of pixels changed in both, to the same colour, and number of pixels changed in either; `[B]` each.
    """
    drawn, due = predicted != now, target != now
    hit = (due & (predicted == target)).flatten(1).sum(1)
    return hit, (drawn | due).flatten(1).sum(1)


def blue_iou(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Sizes of intersection and union of the blue regions of two frames, palette indices `[B, H, W]`; `[B]` each."""
    ours, theirs = predicted == BLUE, target == BLUE
    return (ours & theirs).flatten(1).sum(1), (ours | theirs).flatten(1).sum(1)
