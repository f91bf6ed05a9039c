"""Batches of images that keep their shape: areas, grids, how many images, padding, order, ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from datamodules.image_text import ImageTextSet
from datamodules.image_text_pairs import Native, NativePairs, draw_areas, exponent, fit_grid

SIZES = [(30, 20), (12, 40), (16, 16), (64, 8), (9, 50)]


class Rows:
    """Pictures whose red channel tells their number, each with a caption of one token."""

    def __init__(self, count: int) -> None:
        self.images = [Image.new("RGB", SIZES[i % 5], (10 * i, 0, 255)) for i in range(count)]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Any, list[str]]:
        return self.images[row], [str(row)]

    def where(self, row: int) -> str:
        return str(row)


class Tokens:
    def encode(self, caption: str, where: str) -> list[int]:
        return [int(caption), 99]


def make_pairs(count: int = 24, train: bool = True, **changes: Any) -> NativePairs:
    options: dict[str, Any] = {"patch_size": 4, "patches": 64, "area": (3.0, 5.0), "eval_area": 16, "flip": 0.0}
    native = Native(**(options | {"mean": (0.0,) * 3, "std": (1.0,) * 3} | changes))
    shared: dict[str, Any] = {"rows": Rows(count), "places": range(count), "tokenizer": Tokens(), "pad_id": 0}
    return NativePairs(native, **shared, size=5, seed=0, train=train)


@pytest.mark.parametrize("height", [1, 17, 300, 4000])
@pytest.mark.parametrize("width", [1, 40, 640])
@pytest.mark.parametrize("area", [1, 7, 128, 4096])
def test_a_grid_is_within_the_area_and_in_the_shape_of_the_image(height, width, area):
    rows, columns = fit_grid(height, width, area)
    assert rows >= 1
    assert columns >= 1
    assert rows * columns <= area
    exact = (area * height / width) ** 0.5, (area * width / height) ** 0.5
    if min(exact) >= 1:  # else the image is longer than the area allows
        assert rows == int(exact[0] + 1e-9)
        assert columns == int(exact[1] + 1e-9)


def test_areas_are_those_of_a_truncated_normal():
    share = (torch.arange(100_000) + 0.5) / 100_000
    n = exponent(share, (7, 12))
    assert float(n.min()) == pytest.approx(7, abs=1e-3)
    assert float(n.max()) == pytest.approx(12, abs=1e-3)
    normal = torch.distributions.Normal(0.0, 1.0)
    for low, high in ((-1.0, -0.5), (-0.5, 0.5), (0.2, 1.0)):
        expected = (normal.cdf(torch.tensor(high)) - normal.cdf(torch.tensor(low))) / 0.6826895
        bounds = 9.5 + 2.5 * low, 9.5 + 2.5 * high
        assert float(((n > bounds[0]) & (n < bounds[1])).float().mean()) == pytest.approx(float(expected), abs=1e-3)
    areas = draw_areas(4000, (7, 12), 0, 0)
    assert int(areas.min()) >= 127
    assert int(areas.max()) <= 4096
    assert not torch.equal(areas, draw_areas(4000, (7, 12), 0, 1))
    assert areas.double().log2().mean() == pytest.approx(9.5, abs=0.1)


def test_all_batches_have_as_many_patches():
    pairs = make_pairs()
    areas = draw_areas(len(pairs), (3.0, 5.0), 0, 0)
    seen: set[int] = set()
    for index in range(len(pairs)):
        batch = pairs.batch(0, index)
        area = int(areas[index])
        assert len(batch["image"]) == 64 // area
        assert 64 - area < len(batch["image"]) * area <= 64
        assert batch["image"].shape[1] == int(batch["grid"].prod(1).max()) <= area
        seen |= {int(row[0]) for row in batch["text"]}
    assert len(set(areas.tolist())) > 1
    assert len(seen) > 12


def test_each_image_keeps_its_shape_its_pixels_and_its_caption():
    batch = make_pairs().batch(0, 0)
    for patches, (rows, columns), text in zip(batch["image"], batch["grid"].tolist(), batch["text"], strict=True):
        number = int(text[0])
        width, height = SIZES[number % 5]
        assert abs(rows - columns * height / width) <= max(1, height / width)
        real = patches[: rows * columns].unflatten(1, (16, 3))
        torch.testing.assert_close(real[..., 0], torch.full_like(real[..., 0], 10 * number / 255))
        assert (real[..., 2] == 1).all()
        assert not patches[rows * columns :].any()


def test_patches_are_in_raster_order_with_values_by_row_column_channel():
    from zoo.methods.aimv2.losses import patchify

    pairs = make_pairs(train=False)
    noise = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8)
    patches, grid = pairs.view(Image.fromarray(noise.numpy()), 0, 0)
    assert grid == (4, 4)
    torch.testing.assert_close(patches, patchify(noise.permute(2, 0, 1)[None] / 255, 4)[0])


def test_evaluation_has_one_area_and_every_image_once():
    pairs = make_pairs(train=False)
    assert len(pairs) == 5
    batches = [pairs.batch(0, index) for index in range(5)]
    assert [int(row[0]) for batch in batches for row in batch["text"]] == list(range(24))
    assert max(int(batch["grid"].prod(1).max()) for batch in batches) <= 16


def test_a_batch_follows_from_epoch_and_index_and_ranks_see_its_slices():
    first, again, later = (make_pairs(flip=0.5).batch(epoch, 1) for epoch in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert first["text"].tolist() != later["text"].tolist()
    parts = []
    for rank in range(2):
        pairs = make_pairs(flip=0.5)
        pairs.rank, pairs.world_size = rank, 2
        parts.append(pairs.batch(0, 1))
    assert torch.equal(torch.cat([part["text"] for part in parts]), first["text"])
    assert torch.equal(torch.cat([part["grid"] for part in parts]), first["grid"])


def test_an_epoch_serves_about_every_image_once():
    pairs = make_pairs(2000)
    served = int(pairs.count(draw_areas(len(pairs), (3.0, 5.0), 0, 0)).sum())
    assert served == pytest.approx(2000, rel=0.05)
    numbers = [n for index in range(len(pairs)) for n in pairs.chosen(0, index)]
    assert len(set(numbers)) == min(served, 2000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"native_patch": 17}, "native_patch: 17 is not accepted; accepted: 1 to image_size: 16"),
        ({"native_area": [3, 7]}, r"native_area: \[3, 7\] is not accepted; .* the 64 patches of a batch"),
        ({"native_area": [3, 2]}, r"native_area: \[3, 2\] is not accepted"),
        ({"class_root": "x"}, "class_root: it is classified by images of one size"),
    ],
)
def test_bad_options_are_refused(changes: dict[str, Any], message: str, tmp_path: Path):
    options: dict[str, Any] = {"image_size": 16, "batch_size": 4, "native_patch": 4, "native_area": [3, 5]}
    with pytest.raises(ValueError, match=message):
        ImageTextSet(str(tmp_path), "none", **(options | changes))
