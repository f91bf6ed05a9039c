"""Images of many sizes as sequences of patches: each is treated as it would be alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from tests.methods.aimv2_toy import gradient_of, make_batch, make_model, step
from zoo.methods.aimv2.losses import patchify, pooled_mean, real_patches
from zoo.methods.aimv2.positions import grid_positions, sincos_positions

TRUNK = {"patch_size": 3, "width": 16, "depth": 2, "heads": 2, "multiple_of": 16, "pos_embed": "sincos"}
GRIDS = [(4, 4), (2, 7), (5, 1), (3, 2)]


def make_native() -> tuple[list[Tensor], dict[str, Tensor]]:
    """Images of four sizes, and the batch of them."""
    generator = torch.Generator().manual_seed(4)
    images = [torch.randn(1, 1, 3 * h, 3 * w, generator=generator) for h, w in GRIDS]
    patches = torch.zeros(4, 16, 9)
    for row, image in enumerate(images):
        own = patchify(image, 3)[0]
        patches[row, : len(own)] = own
    return images, {**make_batch(4), "image": patches, "grid": torch.tensor(GRIDS)}


def test_positions_of_a_batch_are_those_of_each_grid():
    found = grid_positions(torch.tensor(GRIDS), 16, 8)
    for row, (h, w) in enumerate(GRIDS):
        assert torch.equal(found[row, : h * w], sincos_positions(h, w, 8))


def test_real_patches():
    assert real_patches(torch.tensor(GRIDS), 16).sum(1).tolist() == [16, 14, 5, 6]


@pytest.mark.parametrize("changes", [{}, {"order": "text_image"}, {"objective": "captioner", "mask": "full"}], ids=str)
def test_each_image_has_the_errors_that_it_has_alone(changes):
    model = make_model(trunk=TRUNK, **changes).eval()
    images, batch = make_native()
    lengths = torch.tensor([3, 13, 1, 4])
    together = model.errors(batch, lengths)
    for row, image in enumerate(images):
        one = {"image": image, "text": batch["text"][row : row + 1]}
        alone = model.errors(one, lengths[row : row + 1])
        assert alone.keys() == together.keys()
        for name, (errors, counted) in alone.items():
            ours, seen = (x[row, : errors.shape[1]] for x in together[name])
            assert torch.equal(seen, counted[0]), name
            torch.testing.assert_close(ours, errors[0], atol=1e-5, rtol=1e-4)
            assert not together[name][1][row, errors.shape[1] :].any()


def test_features_and_captions_are_those_of_each_image_alone():
    model = make_model(trunk=TRUNK).eval()
    images, batch = make_native()
    out = model.predict_step(batch, 0)
    for row, image in enumerate(images):
        h, w = GRIDS[row]
        torch.testing.assert_close(out["features"][row, : h * w], model(image)[0], atol=1e-5, rtol=1e-4)
        alone = model.caption(image)[0]
        assert torch.equal(out["caption"][row, : len(alone)], alone)
        assert (out["caption"][row, len(alone) :] == model.hparams["pad_id"]).all()


def test_the_prefix_leaves_something_of_each_image():
    model = make_model(trunk=TRUNK)
    _, batch = make_native()
    many = {"image": batch["image"].repeat(500, 1, 1), "grid": batch["grid"].repeat(500, 1)}
    lengths = model.draw_prefix(many, 2000, 0).view(500, 4)
    assert lengths.amin(0).tolist() == [1, 1, 1, 1]
    assert lengths.amax(0).tolist() == [15, 13, 4, 5]
    torch.testing.assert_close(lengths.float().mean(0), torch.tensor([8.0, 7.0, 2.5, 3.0]), atol=0.5, rtol=0)
    torch.manual_seed(1)
    whole = model.draw_prefix(batch, 4, 0)
    torch.manual_seed(1)
    half = {"image": batch["image"][2:], "grid": batch["grid"][2:]}
    assert torch.equal(model.draw_prefix(half, 4, 2), whole[2:])


def test_a_step_trains_on_the_real_patches_alone():
    model = make_model(trunk=TRUNK)
    _, batch = make_native()
    loss = step(model, batch)["total"]
    loss.backward()
    assert gradient_of(model, "trunk.patch_embed") > 0
    noise = torch.where(real_patches(batch["grid"], 16)[..., None], batch["image"], torch.randn(4, 16, 9))
    torch.testing.assert_close(step(model, {**batch, "image": noise})["total"], loss)
    errors, counted = model.errors(batch, torch.ones(4, dtype=torch.int64))["pixel"]
    assert int(counted.sum()) == sum(h * w - 1 for h, w in GRIDS)
    assert torch.isfinite(pooled_mean(errors, counted))


def test_figures_show_images_in_their_shape():
    model = make_model(trunk=TRUNK).eval()
    images, batch = make_native()
    model.log = model.log_dict = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    model.validation_step(batch, 0)
    model._trainer = SimpleNamespace(datamodule=None)  # type: ignore[assignment]
    assert set(model.figures()) == {"next_patches", "captions"}
    for picture, image in zip(model.pictures(batch["image"], batch["grid"]), images, strict=True):
        assert torch.equal(picture, image[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trunk": {**TRUNK, "pos_embed": "absolute"}}, "trunk.pos_embed: 'absolute' is made for images of one size"),
        ({"trunk": TRUNK, "objective": "clip"}, "objective: 'clip' is made for images of one size"),
        ({"trunk": TRUNK, "pixel_norm": "paper"}, "pixel_norm: 'paper' is made for images of one size"),
    ],
)
def test_what_needs_images_of_one_size(changes, message):
    with pytest.raises(ValueError, match=message):
        step(make_model(**changes), make_native()[1])
