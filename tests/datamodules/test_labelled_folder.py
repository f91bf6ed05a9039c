"""Labelled folders under timm's transforms: the same batch from the same key, whoever builds it."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.labelled_folder import LabelledFolders


@pytest.fixture
def root(tmp_path: Path) -> str:
    for part, count in (("train", 4), ("val", 2)):
        for label, name in enumerate(("a", "b")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                colours = np.random.default_rng(100 * label + i).integers(0, 255, (40, 50, 3), dtype=np.uint8)
                colours[..., label] = 255
                Image.fromarray(colours).save(tmp_path / part / name / f"{part}{i}.png")
    return str(tmp_path)


def make_data(root: str, **changes) -> LabelledFolders:
    arguments = {"image_size": 16, "batch_size": 3, "eval_batch_size": 3, "val_per_class": 1, "num_workers": 0}
    data = LabelledFolders(root, **(arguments | {"auto_augment": "rand-m9-mstd0.5-inc1"} | changes))
    data.setup("fit")
    data.setup("test")
    return data


def test_batches_hold_labelled_images_alone_and_follow_from_their_key(root):
    data = make_data(root)
    batches = data.train_dataloader().dataset
    assert len(batches) == 2  # 6 of 8 images are trained on
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    first = batches.batch(0, 0)
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
    random.seed(99)
    np.random.seed(99)
    again = batches.batch(0, 0)
    assert torch.equal(first["labelled"], again["labelled"])
    assert first["labelled"].shape == (3, 3, 16, 16)
    assert first["views"] == []
    seen = torch.cat([batches.batch(0, i)["target"] for i in range(2)])
    assert seen.bincount().tolist() == [3, 3]
    assert not torch.equal(batches.batch(2, 0)["labelled"], first["labelled"])
    assert data.num_classes == 2


def test_evaluation_is_the_middle_under_the_statistics_that_are_asked_for(root):
    plain, other = make_data(root), make_data(root, mean=[0.5] * 3, std=[0.5] * 3)
    a, b = (list(data.test_dataloader()) for data in (plain, other))
    assert torch.cat([x["target"] for x in a]).tolist() == [0, 0, 1, 1]
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(a[0]["image"] * std + mean, b[0]["image"] * 0.5 + 0.5)
    assert (b[0]["image"][0, 0] == 1).all()  # the colour of the class
    assert [len(x["target"]) for x in plain.val_dataloader()] == [2]
