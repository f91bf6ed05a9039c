"""Augmentation of batches of images: each change against torchvision, and what is drawn for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from datamodules import augment
from datamodules.augment import Augment
from datamodules.images import FashionMNIST


def fixed(view: Augment, n: int, **values: Any) -> dict[str, Tensor]:
    """Parameters that leave images as they are, but for `values`."""
    drawn = {
        "width": torch.ones(n),
        "height": torch.ones(n),
        "left": torch.zeros(n),
        "top": torch.zeros(n),
        "flip": torch.zeros(n, dtype=torch.bool),
    }
    return drawn | {key: torch.as_tensor(value).expand(n) for key, value in values.items()}


@pytest.fixture
def photos() -> Tensor:
    """Smooth colour images, uint8 `[6, 3, 32, 32]`."""
    coarse = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return (torch.nn.functional.interpolate(coarse, size=32, mode="bilinear") * 255).round().to(torch.uint8)


def test_the_whole_image_stays_as_it_is(photos: Tensor) -> None:
    view = Augment(32)
    torch.testing.assert_close(view.apply(photos, fixed(view, 6)), photos.float() / 255)


@pytest.mark.parametrize("size", [12, 32, 45])
def test_resizing_is_that_of_torchvision(photos: Tensor, size: int) -> None:
    from torchvision.transforms.v2 import functional as F

    view = Augment(size)
    expected = F.resize(photos.float() / 255, [size, size], antialias=True)
    torch.testing.assert_close(view.apply(photos, fixed(view, 6)), expected, atol=1e-5, rtol=0)


def test_a_crop_is_where_it_was_drawn(photos: Tensor) -> None:
    view = Augment(16)
    drawn = fixed(view, 6, width=0.5, height=0.5, left=0.25, top=0.125)
    torch.testing.assert_close(view.apply(photos, drawn), photos[:, :, 4:20, 8:24].float() / 255)
    drawn["flip"] = torch.ones(6, dtype=torch.bool)
    torch.testing.assert_close(view.apply(photos, drawn), photos[:, :, 4:20, 8:24].flip(3).float() / 255)


@pytest.mark.parametrize(
    ("name", "value", "reference"),
    [
        ("brightness", 1.3, "adjust_brightness"),
        ("brightness", 0.6, "adjust_brightness"),
        ("contrast", 1.4, "adjust_contrast"),
        ("contrast", 0.4, "adjust_contrast"),
        ("saturation", 1.8, "adjust_saturation"),
        ("hue", 0.2, "adjust_hue"),
        ("hue", -0.4, "adjust_hue"),
    ],
)
def test_changes_of_colour_are_those_of_torchvision(photos: Tensor, name: str, value: float, reference: str) -> None:
    from torchvision.transforms.v2 import functional as F

    x = photos.float() / 255
    expected = getattr(F, reference)(x, value)
    ours = augment.COLOUR_CHANGES[name](x, torch.full((6, 1, 1, 1), value))
    torch.testing.assert_close(ours, expected, atol=2e-3 if name != "hue" else 2e-2, rtol=0)


def test_blur_is_that_of_torchvision_away_from_the_border(photos: Tensor) -> None:
    from torchvision.transforms.v2 import functional as F

    view = Augment(32, blur=1.0)
    ours = view.apply(photos, fixed(view, 6, sigma=1.5))
    expected = F.gaussian_blur(photos.float() / 255, [13, 13], [1.5, 1.5])
    torch.testing.assert_close(ours[:, :, 6:-6, 6:-6], expected[:, :, 6:-6, 6:-6], atol=1e-3, rtol=0)


def test_solarisation_inverts_what_is_bright(photos: Tensor) -> None:
    view = Augment(32, solarize=1.0)
    x = photos.float() / 255
    torch.testing.assert_close(view.apply(photos, fixed(view, 6, solarize=True)), torch.where(x >= 0.5, 1 - x, x))


def test_drawn_parameters_follow_their_distributions() -> None:
    view = Augment(28, scale=(0.2, 0.5), flip=0.3, brightness=0.4, jitter=0.8, blur=0.5, grey=0.2)
    drawn = view.draw(20000, torch.Generator().manual_seed(0))
    area = drawn["width"] * drawn["height"]
    assert area.max() <= 0.5 + 1e-5
    assert float(area.mean()) == pytest.approx(0.35, abs=0.01)
    assert (drawn["left"] + drawn["width"]).max() <= 1 + 1e-6
    assert float(drawn["flip"].float().mean()) == pytest.approx(0.3, abs=0.02)
    assert float((drawn["brightness"] != 1).float().mean()) == pytest.approx(0.8, abs=0.02)
    assert float((drawn["sigma"] > 0).float().mean()) == pytest.approx(0.5, abs=0.02)


def test_every_image_has_an_augmentation_of_its_own(photos: Tensor) -> None:
    view = Augment(32, scale=(0.3, 1.0), brightness=0.4)
    out = view(photos[:1].expand(6, -1, -1, -1), torch.Generator().manual_seed(0))
    assert len({float(image.sum()) for image in out}) == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sacle": [0.1, 1.0]}, r"views\[0\].sacle.*did you mean 'scale'"),
        ({"scale": [0.9, 0.1]}, r"views\[0\].scale: \[0.9, 0.1\]"),
        ({"flip": 2}, "flip: 2 is no probability"),
        ({"count": 0}, r"count: 0 is not accepted"),
    ],
)
def test_a_wrong_view_is_explained(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FashionMNIST(views=[options])
