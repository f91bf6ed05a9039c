"""A run to be disturbed: points read from a file for each batch, and callbacks that disturb it from within."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from tests.conformance.exemplary.data import PointBatches
from tests.conformance.exemplary.method import Exemplary
from zoo import Batches, Card, ResumableLoader, ZooDataModule
from zoo.nn.ema import frozen_copy

COUNT = 30


class FileBatches(Batches):
    """Batches whose points are read when they are asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __len__(self) -> int:
        return COUNT

    def batch(self, epoch: int, index: int) -> dict[str, Tensor]:
        """Eight points of the file."""
        rows = torch.from_numpy(np.load(self.path)[(epoch * COUNT + index) * 8 :][:8])[self.rows(8)]
        return {"x": rows, "y": (rows.sum(1) > 0).long()}


class FilePoints(ZooDataModule):
    """Points in a file.

    Args:
        path: The file; made if it is not there when the run is set up.
        batch_size: Points in a batch; only 8 is possible.
        num_workers: Loader processes.
        data_seed: Seed of the points.
    """

    num_classes = 2

    def __init__(self, path: str, batch_size: int = 8, num_workers: int = 0, data_seed: int = 0) -> None:
        super().__init__(num_workers, data_seed)
        self.path = Path(path)

    def setup(self, stage: str) -> None:
        """Write the points."""
        if not self.path.exists():
            points = np.random.default_rng(self.data_seed).normal(size=(8 * COUNT * 20, 4)).astype(np.float32)
            with self.path.open("wb") as file:
                np.save(file, points)

    def train_dataloader(self) -> ResumableLoader:
        """The points in order."""
        return self.loader(FileBatches(self.path))

    def val_dataloader(self) -> Any:
        """Points from memory."""
        return self.loader(PointBatches(2, 77), same_every_epoch=True)

    test_dataloader = val_dataloader


class Fragile(Exemplary):
    """The exemplary method, with ways of failing.

    Args:
        num_classes: Classes, from the data.
        lr: Learning rate.
        width: Hidden units.
        nan_at: Step at which the loss becomes NaN.
        memory_at: Step at which the device has no memory left.
    """

    card = Card(title="Fragile", summary="fails when told to", links={"num_classes": "num_classes"})

    def __init__(
        self, num_classes: int, lr: float = 0.1, width: int = 64, nan_at: int = -1, memory_at: int = -1
    ) -> None:
        super(Exemplary, self).__init__()  # the networks are others
        self.net = torch.nn.Sequential(torch.nn.Linear(4, width), torch.nn.Tanh(), torch.nn.Linear(width, num_classes))
        self.teacher = frozen_copy(self.net)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.save_hyperparameters()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy, or a failure."""
        if self.global_step == self.hparams["memory_at"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee the documentation")
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.global_step == self.hparams["nan_at"] else loss


class Disturb(Callback):
    """Does something at a step.

    Args:
        step: Optimiser steps done.
        what: `remove`: delete `path`. `forbid`: no file can grow any more, as on a full disk. `allow`: files can grow
            again. `kill_worker`: SIGKILL to a loader worker. `wait`: until `path` is there; `waiting-<step>` in the
            directory of the run says that it does.
        path: A file.
    """

    def __init__(self, step: int, what: str, path: str = "") -> None:
        self.step, self.what, self.path = step, what, Path(path)

    @property
    def state_key(self) -> str:
        return f"Disturb-{self.step}-{self.what}"

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Do it."""
        if trainer.global_step != self.step:
            return
        if self.what == "remove":
            self.path.unlink(missing_ok=True)
        elif self.what in ("forbid", "allow"):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (0 if self.what == "forbid" else most, most))
        elif self.what == "wait":
            import time

            Path(trainer.default_root_dir, f"waiting-{self.step}").touch()
            while not self.path.exists():
                time.sleep(0.01)
        elif self.what == "kill_worker":
            loader: Any = trainer.train_dataloader
            os.kill(loader._loader._iterator._workers[0].pid, signal.SIGKILL)
