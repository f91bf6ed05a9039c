"""Sources of images, augmentation, and the semi-supervised batches made of them."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from datamodules import augment, sources
from datamodules.augment import Augment
from datamodules.image_folder import ImageFolders
from datamodules.images import CIFAR10, Digits, FashionMNIST, draw_split
from datamodules.loading import cycled_order


def write_idx(path: Path, array: np.ndarray[Any, Any]) -> None:
    header = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture
def tiny_fashion_mnist(tmp_path: Path) -> Path:
    """Fashion-MNIST of 200 + 40 images in the true format."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 200), ("t10k", 40)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", rng.integers(0, 256, (n, 28, 28)))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(n) % 10)
    return tmp_path


# -- sources --------------------------------------------------------------------------------------------------------


def test_fashion_mnist_of_the_system_package_is_read() -> None:
    images, target = sources.source("fashion_mnist").load(None, train=False)
    assert images.shape == (10000, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert torch.bincount(target).tolist() == [1000] * 10


def test_statistics_are_those_of_the_training_images() -> None:
    for name in ("fashion_mnist", "digits"):
        source = sources.source(name)
        x = source.load(None, train=True)[0].double() / 255
        assert source.mean[0] == pytest.approx(float(x.mean()), abs=1e-3)
        assert source.std[0] == pytest.approx(float(x.std()), abs=1e-3)


def test_digits_are_divided_without_overlap() -> None:
    train, test = (sources.source("digits").load(None, train=part) for part in (True, False))
    assert len(train[0]) + len(test[0]) == 1797
    assert torch.bincount(test[1]).min() > 20


@pytest.mark.parametrize("damage", ["truncated archive", "truncated content", "other file"])
def test_a_damaged_file_is_named(tiny_fashion_mnist: Path, damage: str) -> None:
    path = tiny_fashion_mnist / "train-images-idx3-ubyte.gz"
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(
        {
            "truncated archive": path.read_bytes()[:-100],
            "truncated content": gzip.compress(content[:-100]),
            "other file": gzip.compress(b"<html>not found</html>"),
        }[damage]
    )
    with pytest.raises(ValueError, match="train-images-idx3-ubyte"):
        sources.source("fashion_mnist").load(str(tiny_fashion_mnist), train=True)


def test_a_missing_data_set_says_where_and_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "DEBIAN_FASHION_MNIST", tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"looked for: .*nowhere.*apt-get install dataset-fashion-mnist"):
        FashionMNIST(root=str(tmp_path / "here")).prepare_data()
    with pytest.raises(FileNotFoundError, match="cifar-10-batches-py"):
        CIFAR10(root=str(tmp_path)).prepare_data()


def write_cifar(root: Path, name: str, content: Any) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(pickle.dumps(content, protocol=2))


def test_cifar_is_read_from_its_own_format(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
    for name in [f"data_batch_{i}" for i in range(1, 6)]:
        write_cifar(tmp_path, name, {"data": rows, "labels": list(range(10)) * 2})
    images, target = sources.source("cifar10").load(str(tmp_path), train=True)
    assert images.shape == (100, 3, 32, 32)
    # a row holds all red values, then green, then blue
    assert images[0, 1, 0, 5] == rows[0, 1024 + 5]
    assert target[:10].tolist() == list(range(10))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "hacked"),)

    write_cifar(tmp_path, "test_batch", {"data": Evil(), "labels": [0]})
    with pytest.raises(ValueError, match="refused to load"):
        sources.source("cifar10").load(str(tmp_path), train=False)
    assert not (tmp_path / "hacked").exists()


# -- augmentation ---------------------------------------------------------------------------------------------------


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


# -- batches --------------------------------------------------------------------------------------------------------


def test_split_is_balanced_disjoint_and_seeded() -> None:
    target = torch.arange(1000) % 10
    split = draw_split(target, val_per_class=20, labels_per_class=5, seed=3)
    assert torch.bincount(target[split["validation"]]).tolist() == [20] * 10
    assert torch.bincount(target[split["labelled"]]).tolist() == [5] * 10
    assert not torch.isin(split["validation"], split["train"]).any()
    assert torch.isin(split["labelled"], split["train"]).all()
    assert torch.equal(split["labelled"], draw_split(target, 20, 5, 3)["labelled"])
    assert not torch.equal(split["labelled"], draw_split(target, 20, 5, 4)["labelled"])
    # another number of labels does not change what is kept for validation
    assert torch.equal(split["validation"], draw_split(target, 20, 50, 3)["validation"])
    with pytest.raises(ValueError, match="labels_per_class: 99 .* accepted: together at most 100"):
        draw_split(target, 20, 99, 0)


def small(**options: Any) -> Digits:
    """Digits, ready for training and test."""
    given = {"labels_per_class": 3, "val_per_class": 10, "batch_size": 64, "labelled_batch_size": 48}
    data = Digits(**{**given, **options})  # type: ignore[arg-type]
    data.setup("fit")
    data.setup("test")
    return data


def same(a: Any, b: Any) -> bool:
    """Whether two batches hold the same tensors."""
    return all(torch.equal(x, y) for key in a for x, y in zip(list(a[key]), list(b[key]), strict=True))


def test_batches_have_the_shapes_that_the_contract_says() -> None:
    data = small(views=[{"count": 2}, {"count": 3, "size": 6, "scale": [0.1, 0.4]}])
    batch = next(iter(data.train_dataloader()))
    assert [tuple(view.shape) for view in batch["views"]] == [(64, 1, 8, 8)] * 2 + [(64, 1, 6, 6)] * 3
    assert batch["labelled"].shape == (48, 1, 8, 8)
    assert batch["target"].shape == (48,)
    assert batch["unlab_target"].shape == (64,)
    # 30 labelled images fill a batch of 48: each is there once before any is there twice
    assert torch.bincount(batch["target"], minlength=10).min() >= 3
    # normalised: about zero mean
    assert abs(float(batch["labelled"].mean())) < 0.3


def test_an_epoch_is_one_pass_over_all_training_images() -> None:
    data = small(views=[{"flip": 0.0, "scale": [1.0, 1.0], "ratio": [1.0, 1.0]}])
    loader = data.train_dataloader()
    seen = torch.cat([batch["views"][0] for batch in loader])
    assert len(loader) == len(data.split["train"]) // 64
    distinct = {row.numpy().tobytes() for row in seen}
    assert len(distinct) > 0.97 * len(seen)  # a few digits of the data set are equal


def test_an_empty_list_of_views_leaves_unlabelled_images_out() -> None:
    batch = next(iter(small(views=[]).train_dataloader()))
    assert batch["views"] == []
    assert len(batch["unlab_target"]) == 0


def test_batches_depend_on_seed_epoch_and_index_alone() -> None:
    first, again, other = (small(data_seed=seed).train_dataloader()._loader.dataset for seed in (0, 0, 1))
    assert same(first.batch(1, 3), again.batch(1, 3))
    for different in (first.batch(1, 4), first.batch(2, 3), other.batch(1, 3)):
        assert not same(first.batch(1, 3), different)


def test_ranks_see_slices_of_the_global_batch() -> None:
    whole = small().train_dataloader()._loader.dataset.batch(0, 2)
    parts = []
    for rank in range(2):
        batches = small().train_dataloader()._loader.dataset
        batches.rank, batches.world_size = rank, 2
        parts.append(batches.batch(0, 2))
    for key in ("labelled", "target", "unlab_target"):
        torch.testing.assert_close(torch.cat([part[key] for part in parts]), whole[key])
    torch.testing.assert_close(torch.cat([part["views"][1] for part in parts]), whole["views"][1])


def test_the_labelled_stream_goes_on_over_epochs() -> None:
    order = cycled_order(30, 0, 300, seed=0)
    assert torch.equal(torch.cat([cycled_order(30, i * 48, 48, seed=0) for i in range(6)]), order[:288])
    for p in range(10):
        assert order[p * 30 : (p + 1) * 30].sort().values.tolist() == list(range(30))


def test_evaluation_serves_every_image_once_in_order() -> None:
    data = small(eval_batch_size=100)
    target = torch.cat([batch["target"] for batch in data.test_dataloader()])
    assert torch.equal(target, data.test[1])
    val = torch.cat([batch["target"] for batch in data.val_dataloader()])
    assert torch.bincount(val).tolist() == [10] * 10
    assert small(val_per_class=0).val_dataloader() == []


def test_stored_labels_are_used_again(tmp_path: Path) -> None:
    chosen = small(data_seed=5).split["labelled"]
    path = tmp_path / "labelled_indices.json"
    path.write_text(json.dumps({"labelled_indices": chosen.tolist()}))
    assert torch.equal(small(labels_file=str(path), val_per_class=0).split["labelled"], chosen)
    path.write_text("{}")
    with pytest.raises(ValueError, match="holds no `labelled_indices`"):
        small(labels_file=str(path))


# -- folders of files -----------------------------------------------------------------------------------------------


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
