"""Folders of image files as ImageNet has them, with the label lists of SimCLR; torchvision decodes and augments."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from datamodules.images import ImageBatch, SemiSupervisedBatch, draw_split, make_views
from datamodules.loading import (
    Batches,
    ResumableLoader,
    ZooDataModule,
    cycled_order,
    epoch_permutation,
    keyed_generator,
)

#: Of ImageNet; 0.228 is the value of SwAV and its descendants.
MEAN, STD = (0.485, 0.456, 0.406), (0.228, 0.224, 0.225)
LISTS = "https://github.com/google-research/simclr/tree/master/imagenet_subsets"


def read_image(path: str) -> Any:
    """Read an image file as RGB (PIL).

    Raises:
        ValueError: If the file is truncated or no image; names it.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        if not Path(path).exists():
            raise FileNotFoundError(f"image {path} has vanished during the run") from error
        raise ValueError(f"image {path} is damaged ({error}); replace or remove it") from error


def class_folders(root: Path) -> list[str]:
    """Return the names of the classes of `root/train/<class>/*`, sorted.

    Raises:
        FileNotFoundError: If there are none.
    """
    folder = root / "train"
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
    if not names:
        raise FileNotFoundError(
            f"no class folders in {folder}; set `data.init_args.root` to a folder with train/<class>/*.jpg and "
            "val/<class>/*.jpg (ImageNet: https://image-net.org, an account is needed)"
        )
    return names


def class_files(folder: Path, classes: list[str]) -> tuple[list[str], Tensor]:
    """List the image files in the folders of `classes`, and the class of each, int64 `[N]`.

    Raises:
        FileNotFoundError: If a folder is missing or holds no image.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    try:
        listed = make_dataset(str(folder), {name: i for i, name in enumerate(classes)}, extensions=IMG_EXTENSIONS)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{folder}: {error}") from error
    return [path for path, _ in listed], torch.tensor([label for _, label in listed], dtype=torch.int64)


def augmented(paths: list[str], transform: Callable[[Any], Tensor], key: tuple[int | str, ...]) -> Tensor:
    """Read and transform images, each with random numbers of its own that follow from `key` and its place; stacked."""
    out = []
    with torch.random.fork_rng(devices=[]):
        for i, path in enumerate(paths):
            # torchvision's transforms draw from the global generator
            torch.manual_seed(keyed_generator(*key, i).initial_seed())
            out.append(transform(read_image(path)))
    return torch.stack(out)


class _TrainBatches(Batches):
    """Unlabelled views and labelled images, read from files."""

    def __init__(self, data: ImageFolders) -> None:
        self.paths, self.target, self.split = data.paths, data.target, data.split
        self.views = [view.torchvision() for view in data.view_list]
        self.labelled_view = data.labelled_augment.torchvision()
        self.size, self.labelled_size, self.seed = data.batch_size, data.labelled_batch_size, data.data_seed

    def __len__(self) -> int:
        return len(self.split["train"]) // self.size

    def batch(self, epoch: int, index: int) -> SemiSupervisedBatch:
        labelled, step = self.split["labelled"], epoch * len(self) + index
        rows = self.rows(self.labelled_size)
        chosen = labelled[cycled_order(len(labelled), step * self.labelled_size, self.labelled_size, self.seed)]
        out: SemiSupervisedBatch = {
            "views": [],
            "labelled": self.read(self.labelled_view, chosen, rows, ("labelled", epoch, index)),
            "target": self.target[chosen[rows]],
            "unlab_target": self.target[:0],
        }
        if self.views:
            train = self.split["train"]
            order = epoch_permutation(len(train), self.seed, epoch)
            chosen = train[order[index * self.size : (index + 1) * self.size]]
            rows = self.rows(self.size)
            out["views"] = [
                self.read(view, chosen, rows, (f"view{i}", epoch, index)) for i, view in enumerate(self.views)
            ]
            out["unlab_target"] = self.target[chosen[rows]]
        return out

    def read(
        self, transform: Callable[[Any], Tensor], chosen: Tensor, rows: slice, key: tuple[int | str, ...]
    ) -> Tensor:
        """Read this process's rows of a global batch; an image's random numbers follow from its place in that batch."""
        paths = [self.paths[i] for i in chosen[rows].tolist()]
        return augmented(paths, transform, (self.seed, *key, rows.start))


class _EvalBatches(Batches):
    """Images resized and cropped at the centre, in order."""

    def __init__(self, paths: list[str], target: Tensor, size: int, batch_size: int) -> None:
        from torchvision.transforms import v2

        self.paths, self.target, self.batch_size = paths, target, batch_size
        self.transform = v2.Compose(
            [
                v2.Resize(round(size * 256 / 224), antialias=True),
                v2.CenterCrop(size),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(list(MEAN), list(STD)),
            ]
        )

    def __len__(self) -> int:
        return -(-len(self.paths) // self.batch_size)

    def batch(self, epoch: int, index: int) -> ImageBatch:
        places = range(len(self.paths))[index * self.batch_size : (index + 1) * self.batch_size]
        mine = list(places)[self.rows(len(places))]
        images = torch.stack([self.transform(read_image(self.paths[i])) for i in mine])
        return {"image": images, "target": self.target[mine]}


class ImageFolders(ZooDataModule):
    """Images in `root/train/<class>/*` and `root/val/<class>/*`; batches are `SemiSupervisedBatch` and `ImageBatch`.

    `val` is the test set. The labelled images are drawn, or named by a list with one file name in each line, as
    SimCLR's 1 % and 10 % of ImageNet are.

    Args:
        root: Folder with `train` and `val`.
        label_list: Text file of labelled images; instead of a draw.
        labels_per_class: Labelled images of each class if there is no list; null for all.
        val_per_class: Training images of each class that are kept for validation.
        image_size: Height and width of the images in pixels.
        batch_size: Unlabelled images in a (global) batch.
        labelled_batch_size: Labelled images in a (global) batch.
        views: Views of an unlabelled image: mappings with the keys of `datamodules.augment.Augment` and `count`; null
            for two of the image size. An empty list leaves unlabelled images out.
        labelled_view: Augmentation of a labelled image, a mapping of the same keys.
        eval_batch_size: Images in a batch of evaluation.
        num_workers: Loader processes; decoding needs several.
        data_seed: Seed of label draw, order and augmentation.
    """

    in_channels = 3

    def __init__(
        self,
        root: str = "data/imagenet",
        label_list: str | None = None,
        labels_per_class: int | None = 10,
        val_per_class: int = 0,
        image_size: int = 224,
        batch_size: int = 256,
        labelled_batch_size: int = 128,
        views: list[dict[str, Any]] | None = None,
        labelled_view: dict[str, Any] | None = None,
        eval_batch_size: int = 256,
        num_workers: int = 8,
        data_seed: int = 0,
    ) -> None:
        super().__init__(num_workers, data_seed)
        self.root = Path(root).expanduser()
        self.label_list, self.labels_per_class, self.val_per_class = label_list, labels_per_class, val_per_class
        self.image_size = image_size
        self.batch_size, self.labelled_batch_size = batch_size, labelled_batch_size
        self.eval_batch_size = eval_batch_size
        common = {"size": image_size, "mean": MEAN, "std": STD}
        from datamodules.augment import Augment

        self.view_list = make_views([{"count": 2}] if views is None else views, "views", **common)
        self.labelled_augment = Augment.from_options(labelled_view or {}, "labelled_view", **common)
        self.split: dict[str, Tensor] = {}

    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes: the folders in `root/train`.

        Raises:
            FileNotFoundError: If there are none.
        """
        return class_folders(self.root)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def prepare_data(self) -> None:
        """Look for the folders."""
        _ = self.classes

    def setup(self, stage: str) -> None:
        """List the files of the stage and draw or read the labelled ones."""
        if stage in ("fit", "validate") and not self.split:
            self.paths, self.target = class_files(self.root / "train", self.classes)
            self.split = draw_split(self.target, self.val_per_class, self.labels_per_class, self.data_seed)
            if self.label_list is not None:
                self.split["labelled"] = self._listed(Path(self.label_list))
            if len(self.split["train"]) < self.batch_size:
                raise ValueError(
                    f"batch_size: {self.batch_size} is more than the {len(self.split['train'])} unlabelled images"
                )
        if stage in ("test", "predict"):
            self.test_paths, self.test_target = class_files(self.root / "val", self.classes)

    def _listed(self, path: Path) -> Tensor:
        if not path.is_file():
            raise FileNotFoundError(f"label_list: {path} is missing; SimCLR's lists are at {LISTS}")
        place = {Path(name).name: i for i, name in enumerate(self.paths)}
        names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        unknown = [name for name in names if name not in place]
        if unknown or not names:
            raise ValueError(
                f"label_list: {path} names {len(unknown)} files that are not in {self.root}/train: {unknown[:3]}"
            )
        indices = torch.tensor([place[name] for name in names]).sort().values
        return indices[torch.isin(indices, self.split["train"])]

    def train_dataloader(self) -> ResumableLoader:
        """Serve `SemiSupervisedBatch`."""
        return self.loader(_TrainBatches(self))

    def val_dataloader(self) -> ResumableLoader | list[Any]:
        """Serve `ImageBatch` of the validation images; nothing if `val_per_class` is 0."""
        chosen = self.split["validation"].tolist()
        return self._evaluation([self.paths[i] for i in chosen], self.target[chosen]) if chosen else []

    def test_dataloader(self) -> ResumableLoader:
        """Serve `ImageBatch` of the images in `root/val`."""
        return self._evaluation(self.test_paths, self.test_target)

    predict_dataloader = test_dataloader

    def _evaluation(self, paths: list[str], target: Tensor) -> ResumableLoader:
        return self.loader(_EvalBatches(paths, target, self.image_size, self.eval_batch_size), same_every_epoch=True)
