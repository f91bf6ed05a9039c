"""A method and a datamodule small enough to run in every test of the frame."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from zoo import Batches, Card, ZooDataModule, keyed_generator


class ToyBatches(Batches):
    """Eight points with the sign of their sum as label."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def batch(self, epoch: int, index: int) -> dict[str, Tensor]:
        x = torch.randn(8, 4, generator=keyed_generator(self.seed, epoch, index))[self.rows(8)]
        return {"x": x, "y": (x.sum(1) > 0).long()}


class ToyData(ZooDataModule):
    """Points in four dimensions.

    Args:
        count: Batches an epoch.
        missing: Behave as if the files were not there.
        data_seed: Seed of the points.
        num_workers: Loader processes.
        batch_size: Points in a batch; only 8 is possible.
    """

    num_classes = 2

    def __init__(
        self, count: int = 5, missing: bool = False, data_seed: int = 0, num_workers: int = 0, batch_size: int = 8
    ) -> None:
        super().__init__(num_workers, data_seed)
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        self.count, self.missing = count, missing

    def setup(self, stage: str | None = None) -> None:
        if self.missing:
            raise FileNotFoundError("no points in /nowhere; get them with apt install points")

    def train_dataloader(self) -> Any:
        return self.loader(ToyBatches(self.count, self.data_seed))

    def val_dataloader(self) -> Any:
        return self.loader(ToyBatches(2, 77), same_every_epoch=True)

    test_dataloader = predict_dataloader = val_dataloader


class Toy(pl.LightningModule):
    """A linear classifier.

    Args:
        num_classes: Classes, from the data.
        lr: Learning rate.
        activation: Only `relu`.
        explode_at: Step at which the loss becomes NaN; -1 for never.
    """

    card = Card(title="Toy", summary="a linear classifier", links={"num_classes": "num_classes"})

    def __init__(self, num_classes: int, lr: float = 0.1, activation: str = "relu", explode_at: int = -1) -> None:
        super().__init__()
        if activation != "relu":
            raise ValueError(f"activation: {activation!r} is unknown; accepted: relu")
        self.save_hyperparameters()
        self.net = torch.nn.Linear(4, num_classes)
        self.dropout = torch.nn.Dropout(0.5)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = torch.nn.functional.cross_entropy(self.dropout(self.net(batch["x"])), batch["y"])
        self.seen += len(batch["x"])
        if self.global_step == self.hparams.explode_at:
            loss = loss * float("nan")
        self.log_dict({"train/loss": loss.detach()}, on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "val")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.evaluate(batch, "test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.net(batch["x"]).argmax(1)

    def evaluate(self, batch: dict[str, Tensor], stage: str) -> None:
        right = (self.net(batch["x"]).argmax(1) == batch["y"]).float().mean()
        self.log_dict({f"{stage}/acc": right}, on_epoch=True, batch_size=len(batch["x"]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)
