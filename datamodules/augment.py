"""Augmentation of small images, batched on tensors: every sample has its own crop, flip and colours.

Cropping and resizing, and blurring, are products with a matrix for the rows and one for the columns of each image, so
that a batch is a few matrix products. A pipeline that takes one image at a time starves a small machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from zoo.errors import did_you_mean

#: Weights of red, green and blue in the luminance (ITU-R BT.601, as torchvision and PIL have it).
LUMINANCE = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Augment:
    """Random resized crop, flip, colour jitter, greyscale, blur, solarisation and normalisation.

    Attributes:
        size: Height and width of the result in pixels.
        scale: Smallest and largest area of the crop, as a part of the image.
        ratio: Smallest and largest width of the crop over its height.
        flip: Probability of a horizontal flip.
        brightness: The factor is drawn from `[1 - b, 1 + b]`.
        contrast: The same, for the distance from the mean luminance of the image.
        saturation: The same, for the distance of each pixel from its luminance.
        hue: The shift is drawn from `[-h, h]`, as part of a turn.
        jitter: Probability of the four changes of colour.
        grey: Probability of losing the colours.
        blur: Probability of a Gaussian blur.
        blur_sigma: Smallest and largest standard deviation of the blur in pixels.
        solarize: Probability of inverting what is brighter than one half.
        mean: Subtracted from each channel.
        std: Each channel is divided by it.

    Departures:
        The changes of colour come in the order of this list, torchvision draws the order. A crop that would be wider or
        higher than the image is cut to it, torchvision draws again.
    """

    size: int
    scale: Sequence[float] = (0.08, 1.0)
    ratio: Sequence[float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    jitter: float = 1.0
    grey: float = 0.0
    blur: float = 0.0
    blur_sigma: Sequence[float] = (0.1, 2.0)
    solarize: float = 0.0
    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)

    def __post_init__(self) -> None:
        for name in ("flip", "jitter", "grey", "blur", "solarize"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} is no probability")
        for name in ("scale", "ratio", "blur_sigma"):
            pair = getattr(self, name)
            if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
                raise ValueError(f"{name}: {list(pair)} is not accepted; accepted: [low, high] with 0 < low <= high")
        if self.scale[1] > 1:
            raise ValueError(f"scale: {list(self.scale)} is not accepted; accepted: parts of the image, at most 1")
        if self.size < 1:
            raise ValueError(f"size: {self.size} is not accepted; accepted: a number of pixels, 1 or more")
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: {getattr(self, name)} is not accepted; accepted: a number from 0 to 1")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue: {self.hue} is not accepted; accepted: a number from 0 to 0.5")

    @classmethod
    def from_options(cls, options: Mapping[str, Any], where: str, **defaults: Any) -> Augment:
        """Build it from a mapping of a config; `where` names the key in messages.

        Raises:
            ValueError: If a key or a value is not accepted.
        """
        known = [field.name for field in fields(cls)]
        for key in options:
            if key not in known:
                raise ValueError(f"{where}.{key} is not accepted; {did_you_mean(key, known)}")
        try:
            return cls(**{**defaults, **options})
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}.{error}") from error

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the parameters of `n` samples, each `[n]`; those of some rows are rows of these."""

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(n, generator=generator)

        def happens(probability: float) -> Tensor:
            return torch.rand(n, generator=generator) < probability

        area, aspect = uniform(*self.scale), uniform(math.log(self.ratio[0]), math.log(self.ratio[1])).exp()
        width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
        drawn = {
            "width": width,
            "height": height,
            "left": uniform(0, 1) * (1 - width),
            "top": uniform(0, 1) * (1 - height),
            "flip": happens(self.flip),
        }
        jitter = happens(self.jitter)
        for name in ("brightness", "contrast", "saturation"):
            if strength := getattr(self, name):
                drawn[name] = torch.where(jitter, uniform(1 - strength, 1 + strength), 1.0)
        if self.hue:
            drawn["hue"] = torch.where(jitter, uniform(-self.hue, self.hue), 0.0)
        if self.grey:
            drawn["grey"] = happens(self.grey)
        if self.blur:
            drawn["sigma"] = torch.where(happens(self.blur), uniform(*self.blur_sigma), 0.0)
        if self.solarize:
            drawn["solarize"] = happens(self.solarize)
        return drawn

    def apply(self, images: Tensor, drawn: Mapping[str, Tensor]) -> Tensor:
        """Augment images `[n, c, H, W]` (uint8) with drawn parameters; `[n, c, size, size]`, float32, normalised."""
        rows = resize_matrix(drawn["top"], drawn["height"], images.shape[2], self.size)
        columns = resize_matrix(drawn["left"], drawn["width"], images.shape[3], self.size)
        columns = torch.where(drawn["flip"][:, None, None], columns.flip(1), columns)
        x = both_axes(images.float() / 255, rows, columns)
        for name, change in COLOUR_CHANGES.items():
            if name in drawn:
                x = change(x, drawn[name][:, None, None, None])
        if "sigma" in drawn:
            blur = blur_matrix(drawn["sigma"], self.size)
            x = both_axes(x, blur, blur)
        if "solarize" in drawn:
            x = torch.where(drawn["solarize"][:, None, None, None] & (x >= 0.5), 1 - x, x)
        return normalise(x, self.mean, self.std)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment images `[n, c, H, W]` (uint8); `[n, c, size, size]`, float32, normalised."""
        return self.apply(images, self.draw(len(images), generator))

    def torchvision(self) -> Callable[[Any], Tensor]:
        """The same augmentation as a pipeline of torchvision for one image at a time, a PIL image or a uint8 tensor."""
        from torchvision.transforms import v2

        kernel = 2 * math.ceil(3 * self.blur_sigma[1]) + 1
        colours = v2.ColorJitter(self.brightness, self.contrast, self.saturation, self.hue)
        return v2.Compose(
            [
                v2.RandomResizedCrop(self.size, scale=tuple(self.scale), ratio=tuple(self.ratio), antialias=True),
                v2.RandomHorizontalFlip(self.flip),
                *([v2.RandomApply([colours], self.jitter)] if self.changes_colours else []),
                *([v2.RandomGrayscale(self.grey)] if self.grey else []),
                *([v2.RandomApply([v2.GaussianBlur(kernel, tuple(self.blur_sigma))], self.blur)] if self.blur else []),
                *([v2.RandomSolarize(128, self.solarize)] if self.solarize else []),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(self.mean), list(self.std)),
            ]
        )

    @property
    def changes_colours(self) -> bool:
        """Whether any of the four changes of colour can happen."""
        return bool(self.brightness or self.contrast or self.saturation or self.hue)


def resize_matrix(start: Tensor, length: Tensor, n: int, size: int) -> Tensor:
    """Matrices that cut out a part of an axis of `n` pixels and resize it to `size` pixels.

    Linear interpolation, with the triangle widened where pixels become fewer, as PIL's antialiasing does.

    Args:
        start: Begin of the part as a fraction of the axis, `[B]`.
        length: Length of the part as a fraction of the axis, `[B]`.
        n: Pixels of the axis.
        size: Pixels of the result.

    Returns:
        `[B, size, n]`; every row sums to 1.
    """
    step = length * n / size
    centres = (start * n)[:, None] + step[:, None] * (torch.arange(size) + 0.5)
    reach = step.clamp(min=1)[:, None, None]
    weights = (1 - (torch.arange(n) + 0.5 - centres[:, :, None]).abs() / reach).clamp_(min=0)
    return weights / weights.sum(dim=2, keepdim=True)


def blur_matrix(sigma: Tensor, n: int) -> Tensor:
    """Matrices of a Gaussian blur along an axis of `n` pixels; `sigma` `[B]` in pixels, 0 for none; `[B, n, n]`."""
    distance = torch.arange(n)[:, None] - torch.arange(n)
    weights = torch.exp(-0.5 * (distance / sigma.clamp(min=1e-3)[:, None, None]) ** 2)
    return weights / weights.sum(dim=2, keepdim=True)


def both_axes(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Apply `rows` `[B, h, H]` and `columns` `[B, w, W]` to images `[B, c, H, W]`; `[B, c, h, w]`."""
    return rows[:, None] @ x @ columns[:, None].mT


def normalise(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Subtract the mean of each channel and divide by its standard deviation; `x` `[B, c, H, W]` in [0, 1]."""
    return (x - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


def luminance(x: Tensor) -> Tensor:
    """Luminance `[B, 1, H, W]` of images `[B, c, H, W]` with one or three channels."""
    if x.shape[1] == 1:
        return x
    return (x * x.new_tensor(LUMINANCE).view(3, 1, 1)).sum(dim=1, keepdim=True)


def change_brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Scale images in [0, 1]; `factor` `[B, 1, 1, 1]`."""
    return (x * factor).clamp_(0, 1)


def change_contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance from the mean luminance of the image."""
    return torch.lerp(luminance(x).mean(dim=(2, 3), keepdim=True).expand_as(x), x, factor).clamp_(0, 1)


def change_saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Scale the distance of each pixel from its luminance; greyscale images stay as they are."""
    return x if x.shape[1] == 1 else torch.lerp(luminance(x).expand_as(x), x, factor).clamp_(0, 1)


def change_hue(x: Tensor, shift: Tensor) -> Tensor:
    """Turn the hue (of hue, saturation and value) by a part of a turn; greyscale images stay as they are."""
    if x.shape[1] == 1:
        return x
    value, low = x.amax(dim=1), x.amin(dim=1)
    spread = value - low
    r, g, b = (x / spread.clamp(min=1e-8)[:, None]).unbind(dim=1)
    hue = torch.where(value == x[:, 0], g - b, torch.where(value == x[:, 1], b - r + 2, r - g + 4))
    turned = hue + 6 * shift[:, 0]
    # each channel is a trapezoid of the hue: https://en.wikipedia.org/wiki/HSL_and_HSV, "HSV to RGB alternative"
    k = (turned[:, None] + x.new_tensor([5.0, 3.0, 1.0]).view(3, 1, 1)) % 6
    return value[:, None] - spread[:, None] * torch.minimum(k, 4 - k).clamp(0, 1)


def lose_colours(x: Tensor, chosen: Tensor) -> Tensor:
    """Replace the chosen images by their luminance."""
    return torch.where(chosen, luminance(x).expand_as(x), x)


COLOUR_CHANGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "brightness": change_brightness,
    "contrast": change_contrast,
    "saturation": change_saturation,
    "hue": change_hue,
    "grey": lose_colours,
}
