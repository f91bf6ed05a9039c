"""What datamodules of images in memory share: a source, where it is looked for, and what it says of its images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from datamodules.loading import ZooDataModule

if TYPE_CHECKING:
    from datamodules.image_files import FolderSource
    from datamodules.sources import ImageSource


class SourceDataModule(ZooDataModule):
    """A datamodule of one source of images; a subclass or an instance names it in `source`.

    Args:
        root: Folder to look in; null for `$ZOO_DATA`, `data`, `~/data` and where a system package puts it.
        download: Whether to fetch it, if it is nowhere.
        num_workers: Loader processes.
        data_seed: Seed of order, augmentation and draws.
    """

    source: ImageSource | FolderSource

    def __init__(self, root: str | None, download: bool, num_workers: int, data_seed: int) -> None:
        super().__init__(num_workers, data_seed)
        self.root, self.download = root, download

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return self.source.num_classes

    @property
    def in_channels(self) -> int:
        """Channels of the images."""
        return self.source.in_channels

    @property
    def image_size(self) -> int:
        """Height and width of the images in pixels."""
        return self.source.image_size

    def prepare_data(self) -> None:
        """Look for the data set; fetch it with `download`."""
        self.source.find(self.root, self.download)
