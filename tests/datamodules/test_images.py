"""Sources of images and the semi-supervised batches made of them."""

from __future__ import annotations

import dataclasses
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

from datamodules import sources
from datamodules.images import CIFAR10, Digits, FashionMNIST, draw_split
from datamodules.loading import cycled_order
from tests.support.batches import same


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
    fashion_mnist = dataclasses.replace(sources.source("fashion_mnist"), system=(tmp_path / "nowhere",))
    monkeypatch.setattr(FashionMNIST, "source", fashion_mnist)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"looked for: data/.*nowhere.*apt-get install dataset-fashion-mnist"):
        FashionMNIST().prepare_data()
    with pytest.raises(FileNotFoundError, match=r"looked for: \S*here/\S*, \S*here/fashion-mnist\. `apt-get install"):
        FashionMNIST(root=str(tmp_path / "here")).prepare_data()
    with pytest.raises(FileNotFoundError, match="cifar-10-batches-py"):
        CIFAR10(root=str(tmp_path)).prepare_data()


def test_a_root_without_the_data_set_is_no_reason_to_take_another_copy(
    tmp_path: Path, tiny_fashion_mnist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZOO_DATA", str(tiny_fashion_mnist))
    FashionMNIST().prepare_data()
    with pytest.raises(FileNotFoundError, match=f"It lies in {tiny_fashion_mnist}: leave out `data.init_args.root`"):
        FashionMNIST(root=str(tmp_path / "elsewhere")).prepare_data()


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
