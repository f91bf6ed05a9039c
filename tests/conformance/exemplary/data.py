"""Points on two sides of a line."""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import Tensor

from zoo import Batches, ResumableLoader, ZooDataModule, keyed_generator


class PointBatch(TypedDict):
    """Points with their side."""

    x: Tensor
    """Points, float32 `[B, 4]`."""
    y: Tensor
    """Side, int64 `[B]`."""


class PointBatches(Batches):
    """Batches of eight points."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def batch(self, epoch: int, index: int) -> PointBatch:
        """Eight points."""
        x = torch.randn(8, 4, generator=keyed_generator(self.seed, epoch, index))[self.rows(8)]
        return {"x": x, "y": (x.sum(1) > 0).long()}


class Points(ZooDataModule):
    """Points in four dimensions.

    Args:
        count: Batches an epoch.
        num_workers: Loader processes.
        data_seed: Seed of the points.
    """

    num_classes = 2

    def __init__(self, count: int = 5, num_workers: int = 0, data_seed: int = 0) -> None:
        super().__init__(num_workers, data_seed)
        self.count = count

    def train_dataloader(self) -> ResumableLoader:
        """Points to train on."""
        return self.loader(PointBatches(self.count, self.data_seed))

    def val_dataloader(self) -> Any:
        """Other points."""
        return self.loader(PointBatches(2, 77), same_every_epoch=True)

    test_dataloader = predict_dataloader = val_dataloader
