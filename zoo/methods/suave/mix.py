"""MixUp and CutMix that append mixed images, with mixed targets, to a batch (arXiv 2306.07483)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mix:
    """One draw of the mixing: `lam` is the share of the first image.

    Args:
        lam: Share of the first image in the result, in `[0, 1]`.
        box: `(top, bottom, left, right)` in pixels that CutMix takes from the second image; None for MixUp.
    """

    lam: float
    box: tuple[int, int, int, int] | None = None

    def images(self, first: Tensor, second: Tensor) -> Tensor:
        """Mix images `[n, c, H, W]` row by row."""
        if self.box is None:
            return torch.lerp(second, first, self.lam)
        top, bottom, left, right = self.box
        out = first.clone()
        out[:, :, top:bottom, left:right] = second[:, :, top:bottom, left:right]
        return out

    def targets(self, first: Tensor, second: Tensor) -> Tensor:
        """Mix distributions `[n, K]` row by row."""
        return self.lam * first + (1.0 - self.lam) * second


def draw_mix(height: int, width: int, alpha: float = 1.0, cutmix_probability: float = 0.5) -> Mix:
    """Draw one `Mix` for a batch from torch's global generator on the CPU.

    The box of CutMix has area `(1 - lam) H W` around a uniform centre and is cut at the border; `lam` is then what is
    left of the first image.

    Args:
        height: Of the images, in pixels.
        width: Of the images, in pixels.
        alpha: Both parameters of the Beta distribution of `lam`.
        cutmix_probability: Probability of CutMix; MixUp otherwise.
    """
    lam = float(torch.distributions.Beta(alpha, alpha).sample())
    coin, centre_y, centre_x = torch.rand(3).tolist()
    if coin >= cutmix_probability:
        return Mix(lam)
    half_h, half_w = height * (1 - lam) ** 0.5 / 2, width * (1 - lam) ** 0.5 / 2
    y, x = centre_y * height, centre_x * width
    top, bottom = max(round(y - half_h), 0), min(round(y + half_h), height)
    left, right = max(round(x - half_w), 0), min(round(x + half_w), width)
    return Mix(1.0 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


def append_labelled_mix(images: Tensor, targets: Tensor, mix: Mix) -> tuple[Tensor, Tensor]:
    """Append to a labelled batch its mix with its own reverse order; `n` rows become `2 n`.

    Args:
        images: `[n, c, H, W]`.
        targets: Distributions `[n, C]`.
        mix: The draw for this batch.
    """
    return (
        torch.cat([images, mix.images(images, images.flip(0))]),
        torch.cat([targets, mix.targets(targets, targets.flip(0))]),
    )
