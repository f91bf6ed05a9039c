"""Folders of image files in the place of a data set in memory: the same reads, decoded when they are asked for."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from datamodules.image_folder import MEAN, STD, class_files, class_folders, read_image


class ImageFiles:
    """Images that are read from files; `images[indices]` decodes these.

    Args:
        paths: The files.
        size: Height and width: the shorter side is resized to it and the middle cut out.
    """

    def __init__(self, paths: list[str], size: int) -> None:
        from torchvision.transforms import v2

        self.paths, self.size = paths, size
        self.transform = v2.Compose([v2.Resize(size, antialias=True), v2.CenterCrop(size), v2.PILToTensor()])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Return the images `indices` `[n]` as uint8 `[n, 3, size, size]`."""
        images = [self.transform(read_image(self.paths[i])) for i in indices.tolist()]
        return torch.stack(images) if images else torch.empty(0, 3, self.size, self.size, dtype=torch.uint8)


class FolderSource:
    """A data set in `root/train/<class>/*` and `root/val/<class>/*`; `val` is the test part. Looks like `ImageSource`.

    Args:
        root: Folder with `train` and `val`.
        image_size: Height and width of the images in pixels.

    Departures:
        Crops are taken from the middle square of an image, not from all of it.
    """

    name, in_channels, mean, std = "image_folder", 3, MEAN, STD

    def __init__(self, root: str | None, image_size: int) -> None:
        self.root, self.image_size = Path(root or "data/imagenet").expanduser(), image_size

    @cached_property
    def classes(self) -> list[str]:
        """Names of the classes: the folders in `root/train`, sorted.

        Raises:
            FileNotFoundError: If there are none.
        """
        return class_folders(self.root)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def find(self, root: str | None = None, download: bool = False) -> Path:
        """Return the folder, if it has classes; it cannot be fetched."""
        return self.root if self.classes else Path()

    def load(self, root: str | None, train: bool) -> tuple[ImageFiles, Tensor]:
        """List the files of a part; images and classes `[N]` (int64)."""
        paths, target = class_files(self.root / ("train" if train else "val"), self.classes)
        return ImageFiles(paths, self.image_size), target
