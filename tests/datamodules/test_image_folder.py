"""Folders of image files: the same kind of batch, lists of labels, and files that are broken or not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.image_folder import ImageFolders
from tests.support.batches import same


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Two classes of twelve training and three test images."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for part, n in (("train", 12), ("val", 3)):
        for c, name in enumerate(("n01", "n02")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 128, (40, 50, 3), dtype=np.uint8) + np.uint8(100 * c)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{name}_{i}.JPEG")
    return tmp_path


def image_folders(root: Path, **options: Any) -> ImageFolders:
    """The folders, ready for training and test."""
    given = {"image_size": 32, "batch_size": 8, "labelled_batch_size": 4, "labels_per_class": 2, "num_workers": 0}
    data = ImageFolders(root=str(root), **{**given, **options})  # type: ignore[arg-type]
    data.setup("fit")
    data.setup("test")
    return data


def test_folders_give_the_same_kind_of_batch(folders: Path) -> None:
    data = image_folders(folders, views=[{"count": 2}, {"size": 16}])
    batch = data.train_dataloader()._loader.dataset.batch(0, 1)
    assert [tuple(view.shape) for view in batch["views"]] == [(8, 3, 32, 32)] * 2 + [(8, 3, 16, 16)]
    assert batch["labelled"].shape == (4, 3, 32, 32)
    # brightness tells the class, so images and classes belong together
    assert ((batch["views"][0].mean(dim=(1, 2, 3)) > 0.6) == batch["unlab_target"].bool()).all()
    again = image_folders(folders, views=[{"count": 2}, {"size": 16}])
    assert same(batch, again.train_dataloader()._loader.dataset.batch(0, 1))
    assert torch.cat([b["target"] for b in data.test_dataloader()]).tolist() == [0, 0, 0, 1, 1, 1]


def test_reading_folders_leaves_the_global_generator_alone(folders: Path) -> None:
    before = torch.get_rng_state()
    image_folders(folders).train_dataloader()._loader.dataset.batch(0, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_label_lists_name_files(folders: Path, tmp_path: Path) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("n01_3.JPEG\nn02_7.JPEG\n")
    data = image_folders(folders, label_list=str(listed))
    assert [Path(data.paths[i]).name for i in data.split["labelled"]] == ["n01_3.JPEG", "n02_7.JPEG"]
    listed.write_text("n03_1.JPEG\n")
    with pytest.raises(ValueError, match=r"list.txt names 1 files that are not in"):
        image_folders(folders, label_list=str(listed))


def test_a_truncated_or_vanished_image_is_named(folders: Path) -> None:
    for path in folders.glob("train/*/*"):
        path.write_bytes(path.read_bytes()[:300])
    batches = image_folders(folders).train_dataloader()._loader.dataset
    with pytest.raises(ValueError, match=r"image .*\.JPEG is damaged"):
        batches.batch(0, 0)
    for path in folders.glob("train/*/*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="has vanished"):
        batches.batch(0, 0)


def test_missing_folders_say_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="train/<class>"):
        ImageFolders(root=str(tmp_path)).prepare_data()
