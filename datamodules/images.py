"""Semi-supervised images: a few with labels beside many without, in the batch that the vision methods agree on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from datamodules import sources
from datamodules.augment import Augment, normalise
from datamodules.in_memory import SourceDataModule
from datamodules.loading import Batches, ResumableLoader, cycled_order, epoch_permutation, keyed_generator


class SemiSupervisedBatch(TypedDict):
    """What a semi-supervised method trains on: `B` unlabelled and `L` labelled images, float32, normalised."""

    views: list[Tensor]
    """Views of the unlabelled images, `[B, c, h, w]` each, the two global ones first; empty if none are asked for."""
    labelled: Tensor
    """Labelled images `[L, c, H, W]`."""
    target: Tensor
    """Their classes, int64 `[L]`."""
    unlab_target: Tensor
    """Classes of the unlabelled images, int64 `[B]`; for metrics, never for training. Empty without views."""


class ImageBatch(TypedDict):
    """What evaluation sees: `B` images, float32, normalised."""

    image: Tensor
    """Images `[B, c, H, W]`."""
    target: Tensor
    """Their classes, int64 `[B]`."""


def draw_split(target: Tensor, val_per_class: int, labels_per_class: int | None, seed: int) -> dict[str, Tensor]:
    """Divide training images into validation and training, and draw the labelled ones, all balanced over classes.

    Args:
        target: Classes `[N]`.
        val_per_class: Images of each class that are kept for validation and never trained on.
        labels_per_class: Labelled images of each class among the others; None for all.
        seed: Seed of the draw.

    Returns:
        Sorted indices `validation`, `train` (all that is not validation) and `labelled` (a part of `train`).

    Raises:
        ValueError: If a class has too few images.
    """
    parts: dict[str, list[Tensor]] = {"validation": [], "train": [], "labelled": []}
    for label, count in enumerate(torch.bincount(target).tolist()):
        wanted = val_per_class + (1 if labels_per_class is None else labels_per_class)
        if wanted > count:
            raise ValueError(
                f"labels_per_class: {labels_per_class} and val_per_class: {val_per_class} are more than the {count} "
                f"images of class {label}; accepted: together at most {count}"
            )
        order = torch.randperm(count, generator=keyed_generator(seed, "labels", label))
        indices = (target == label).nonzero().flatten()[order]
        parts["validation"].append(indices[:val_per_class])
        parts["train"].append(indices[val_per_class:])
        last = None if labels_per_class is None else val_per_class + labels_per_class
        parts["labelled"].append(indices[val_per_class:last])
    return {name: torch.cat(part).sort().values for name, part in parts.items()}


def make_views(options: Sequence[Mapping[str, Any]], where: str, **defaults: Any) -> list[Augment]:
    """Read a list of views; `count` repeats one, the other keys are those of `Augment`.

    Raises:
        ValueError: If a key or value is not accepted.
    """
    views: list[Augment] = []
    for i, option in enumerate(options):
        if not isinstance(option, Mapping):
            raise ValueError(f"{where}[{i}]: {option!r} is not accepted; accepted: a mapping, e.g. {{size: 28}}")
        rest = dict(option)
        count = rest.pop("count", 1)
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"{where}[{i}].count: {count!r} is not accepted; accepted: 1 or more")
        views += [Augment.from_options(rest, f"{where}[{i}]", **defaults)] * count
    return views


class _TrainBatches(Batches):
    """Unlabelled views and labelled images, from images in memory."""

    def __init__(self, data: SemiSupervisedImages) -> None:
        self.images, self.target, self.split = data.images, data.target, data.split
        self.views, self.labelled_view = data.view_list, data.labelled_augment
        self.size, self.labelled_size, self.seed = data.batch_size, data.labelled_batch_size, data.data_seed
        self.length = data.steps_per_epoch

    def __len__(self) -> int:
        return self.length

    def batch(self, epoch: int, index: int) -> SemiSupervisedBatch:
        step = epoch * len(self) + index
        labelled = self.split["labelled"]
        rows = self.rows(self.labelled_size)
        chosen = labelled[cycled_order(len(labelled), step * self.labelled_size, self.labelled_size, self.seed)]
        out: SemiSupervisedBatch = {
            "views": [],
            "labelled": self.augment(self.labelled_view, chosen, rows, "labelled", epoch, index),
            "target": self.target[chosen[rows]],
            "unlab_target": self.target[:0],
        }
        if self.views:
            train = self.split["train"]
            order = epoch_permutation(len(train), self.seed, epoch)
            chosen = train[order[index * self.size : (index + 1) * self.size]]
            rows = self.rows(len(chosen))
            out["views"] = [
                self.augment(view, chosen, rows, f"view{i}", epoch, index) for i, view in enumerate(self.views)
            ]
            out["unlab_target"] = self.target[chosen[rows]]
        return out

    def augment(self, view: Augment, chosen: Tensor, rows: slice, name: str, epoch: int, index: int) -> Tensor:
        """Draw for the global batch, build this process's rows of it."""
        drawn = view.draw(len(chosen), keyed_generator(self.seed, name, epoch, index))
        return view.apply(self.images[chosen[rows]], {key: value[rows] for key, value in drawn.items()})


class _EvalBatches(Batches):
    """Images as they are, in order."""

    def __init__(self, images: Tensor, target: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> None:
        self.images, self.target, self.size, self.mean, self.std = images, target, size, mean, std

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def batch(self, epoch: int, index: int) -> ImageBatch:
        images = self.images[index * self.size : (index + 1) * self.size]
        target = self.target[index * self.size : (index + 1) * self.size]
        rows = self.rows(len(images))
        return {"image": normalise(images[rows].float() / 255, self.mean, self.std), "target": target[rows]}


class SemiSupervisedImages(SourceDataModule):
    """Images in memory, a class-balanced part of them labelled; batches are `SemiSupervisedBatch` and `ImageBatch`.

    A subclass names the data set in `source`.

    All training images but those for validation are unlabelled images, the labelled ones among them, as in the official
    code. Labelled images are an endless shuffled stream: a set smaller than its batch is repeated. An epoch is one pass
    over the unlabelled images. The labelled indices are written to `labelled_indices.json` in the run directory.

    Args:
        root: Folder to look in; null for `$ZOO_DATA`, `data`, `~/data` and where a system package puts it.
        download: Whether to fetch it, if it is nowhere.
        labels_per_class: Labelled images of each class; null for all.
        labels_file: JSON file of labelled indices, as a run writes it; instead of a draw.
        val_per_class: Training images of each class that are kept for validation.
        batch_size: Unlabelled images in a (global) batch.
        labelled_batch_size: Labelled images in a (global) batch.
        views: Views of an unlabelled image: mappings with the keys of `datamodules.augment.Augment` and `count`; null
            for two of the image's own size. An empty list leaves unlabelled images out.
        labelled_view: Augmentation of a labelled image, a mapping of the same keys.
        eval_batch_size: Images in a batch of evaluation.
        num_workers: Loader processes; 0 is best for images in memory.
        data_seed: Seed of label draw, order and augmentation.
    """

    source: sources.ImageSource
    images: Tensor
    target: Tensor
    test: tuple[Tensor, Tensor]

    def __init__(
        self,
        root: str | None = None,
        download: bool = False,
        labels_per_class: int | None = 10,
        labels_file: str | None = None,
        val_per_class: int = 100,
        batch_size: int = 128,
        labelled_batch_size: int = 64,
        views: list[dict[str, Any]] | None = None,
        labelled_view: dict[str, Any] | None = None,
        eval_batch_size: int = 1000,
        num_workers: int = 0,
        data_seed: int = 0,
    ) -> None:
        super().__init__(root, download, num_workers, data_seed)
        for key, value, least in (
            ("labels_per_class", 1 if labels_per_class is None else labels_per_class, 1),
            ("val_per_class", val_per_class, 0),
            ("batch_size", batch_size, 1),
            ("labelled_batch_size", labelled_batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
        ):
            if value < least:
                raise ValueError(f"{key}: {value} is not accepted; accepted: {least} or more")
        self.labels_per_class, self.labels_file, self.val_per_class = labels_per_class, labels_file, val_per_class
        self.batch_size, self.labelled_batch_size = batch_size, labelled_batch_size
        self.eval_batch_size = eval_batch_size
        common = {"size": self.source.image_size, "mean": self.source.mean, "std": self.source.std}
        self.view_list = make_views([{"count": 2}] if views is None else views, "views", **common)
        self.labelled_augment = Augment.from_options(labelled_view or {"scale": [0.6, 1.0]}, "labelled_view", **common)
        self.split: dict[str, Tensor] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in one pass over the unlabelled images."""
        return len(self.split["train"]) // self.batch_size

    def setup(self, stage: str) -> None:
        """Read the images of the stage and draw the labelled ones."""
        if stage in ("fit", "validate") and not self.split:
            self.images, self.target = self.source.load(self.root, train=True)
            self.split = draw_split(self.target, self.val_per_class, self.labels_per_class, self.data_seed)
            if self.labels_file is not None:
                self.split["labelled"] = read_labelled(Path(self.labels_file), self.split["train"])
            if not self.steps_per_epoch:
                raise ValueError(
                    f"batch_size: {self.batch_size} is more than the {len(self.split['train'])} unlabelled images"
                )
        if stage == "fit":
            self._store_labelled()
        if stage in ("test", "predict"):
            self.test = self.source.load(self.root, train=False)

    def _store_labelled(self) -> None:
        if self.trainer is not None and self.trainer.is_global_zero:
            content = {
                "source": self.source.name,
                "labels_per_class": self.labels_per_class,
                "data_seed": self.data_seed,
                "labelled_indices": self.split["labelled"].tolist(),
            }
            folder = Path(self.trainer.default_root_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "labelled_indices.json").write_text(json.dumps(content) + "\n")

    def train_dataloader(self) -> ResumableLoader:
        """Serve `SemiSupervisedBatch`."""
        return self.loader(_TrainBatches(self))

    def val_dataloader(self) -> ResumableLoader | list[Any]:
        """Serve `ImageBatch` of the validation images; nothing if `val_per_class` is 0."""
        chosen = self.split["validation"]
        return self._evaluation(self.images[chosen], self.target[chosen]) if len(chosen) else []

    def test_dataloader(self) -> ResumableLoader:
        """Serve `ImageBatch` of the test images."""
        return self._evaluation(*self.test)

    predict_dataloader = test_dataloader

    def _evaluation(self, images: Tensor, target: Tensor) -> ResumableLoader:
        batches = _EvalBatches(images, target, self.eval_batch_size, self.source.mean, self.source.std)
        return self.loader(batches, same_every_epoch=True)


def read_labelled(path: Path, train: Tensor) -> Tensor:
    """Read the indices of labelled images from a file that a run has written; sorted, int64.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no indices, or some that are not training images.
    """
    if not path.is_file():
        raise FileNotFoundError(f"labels_file: {path} is missing")
    try:
        indices = torch.tensor(json.loads(path.read_text())["labelled_indices"], dtype=torch.int64).sort().values
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"labels_file: {path} holds no `labelled_indices` ({error!r})") from error
    if not len(indices) or not torch.isin(indices, train).all():
        raise ValueError(f"labels_file: {path} names images that are not in the training part of this split")
    return indices


class FashionMNIST(SemiSupervisedImages):
    """Fashion-MNIST: greyscale images of 28 pixels, ten kinds of clothing, 60,000 for training, 10,000 for the test."""

    source = sources.source("fashion_mnist")


class CIFAR10(SemiSupervisedImages):
    """CIFAR-10: colour images of 32 pixels, ten classes, 50,000 for training and 10,000 for the test."""

    source = sources.source("cifar10")


class CIFAR100(SemiSupervisedImages):
    """CIFAR-100: colour images of 32 pixels, a hundred classes, 50,000 for training and 10,000 for the test."""

    source = sources.source("cifar100")


class Digits(SemiSupervisedImages):
    """scikit-learn's digits: greyscale images of 8 pixels, 1,438 to train on and 359 for the test; nothing to fetch."""

    source = sources.source("digits")
