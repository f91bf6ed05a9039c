"""A small run in which everything that a resume could lose matters, for the tests of this folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor, nn

from callbacks.atomic_checkpoint_io import AtomicCheckpointIO
from callbacks.resume_checkpoint import ResumeCheckpoint
from datamodules.loading import Batches, ZooDataModule, epoch_permutation, keyed_generator

ROWS, BATCH = 40, 8  # five steps an epoch


class ToyBatches(Batches):
    """Noisy rows in an order that depends on the epoch."""

    def __len__(self) -> int:
        return ROWS // BATCH

    def batch(self, epoch: int, index: int) -> dict[str, Tensor]:
        data = torch.randn(ROWS, 4, generator=keyed_generator(1, "rows"))
        rows = epoch_permutation(ROWS, 0, epoch)[index * BATCH : (index + 1) * BATCH]
        noise = 0.1 * torch.randn(BATCH, 4, generator=keyed_generator(0, "noise", epoch, index))
        x = (data[rows] + noise)[self.rows(BATCH)]
        return {"x": x, "y": x.sum(1, keepdim=True).tanh()}


class ToyData(ZooDataModule):
    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        return {**batch, "x": batch["x"] + 0.01 * torch.randn_like(batch["x"])}

    def train_dataloader(self) -> Any:
        return self.loader(ToyBatches())

    def val_dataloader(self) -> Any:
        return self.loader(ToyBatches())

    def predict_dataloader(self) -> Any:
        return self.loader(ToyBatches())


class Toy(LightningModule):
    """Dropout, batch norm, an EMA, augmentation on the fly, three kinds of random numbers and two schedulers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 1))
        self.register_buffer("ema", torch.zeros(8, 4))

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        noise = random.gauss(0, 0.1) + np.random.normal(0, 0.1)
        loss = (self.net(batch["x"]) - batch["y"] + noise).square().mean()
        self.log_dict({"train/loss": loss.detach()}, on_step=True, on_epoch=False)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.ema.mul_(0.9).add_(self.net[0].weight.detach(), alpha=0.1 * random.random())

    def on_train_epoch_start(self) -> None:
        self.ema.add_(0.01 * torch.randn(8, 4))

    def on_train_epoch_end(self) -> None:
        self.log("train/ema", self.ema.square().mean(), sync_dist=True)
        self.ema.add_(0.01 * np.random.rand())

    def validation_step(self, batch: dict[str, Tensor]) -> None:
        loss = (self.net(batch["x"]) - batch["y"]).square().mean() + 0.1 * torch.rand(())
        self.log("val/loss", loss, batch_size=len(batch["x"]), sync_dist=True)

    def predict_step(self, batch: dict[str, Tensor]) -> Tensor:
        return self.net(batch["x"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        total = int(self.trainer.estimated_stepping_batches)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=0.5)
        return [optimizer], [
            {"scheduler": cosine, "interval": "step"},
            {"scheduler": plateau, "interval": "epoch", "monitor": "val/loss"},
        ]


class LineLogger(Logger):
    """Writes each row at once; a resume drops the rows that will be written again."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    @property
    def name(self) -> str:
        return "lines"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            with self.path.open("a") as file:
                file.write(json.dumps([step, dict(metrics)]) + "\n")

    def rows(self) -> list[Any]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def rewind(self, step: int) -> None:
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            kept = [row for row in self.rows() if row[0] < step]
            self.path.write_text("".join(json.dumps(row) + "\n" for row in kept))


class At(Callback):
    """Does something to the process at a given moment: the hook's `count`-th call."""

    def __init__(self, hook: str, count: int, action: int | Exception) -> None:
        super().__init__()
        self.count, self.action = count, action
        setattr(self, hook, self._call)

    def _call(self, *args: Any, **kwargs: Any) -> None:
        self.count -= 1
        if self.count == 0:
            if isinstance(self.action, Exception):
                raise self.action
            os.kill(os.getpid(), self.action)


def fit(
    folder: Path, callbacks: list[Callback], checkpoint: Path | None = None, make: Callable[[], LightningModule] = Toy,
    num_workers: int = 0, **trainer_options: Any,
) -> Trainer:  # fmt: skip
    """Train the toy and leave `final.pt`: everything that has to be equal."""
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    seed_everything(7 + int(os.environ.get("LOCAL_RANK", "0")), verbose=False)
    module = make()
    logger = LineLogger(folder / "log.jsonl")
    options: dict[str, Any] = {
        "max_epochs": 3, "accelerator": "cpu", "devices": 1, "log_every_n_steps": 1, "num_sanity_val_steps": 0,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "use_distributed_sampler": False, "default_root_dir": str(folder), "logger": logger,
        "plugins": [AtomicCheckpointIO()],
    }  # fmt: skip
    trainer = Trainer(**(options | trainer_options), callbacks=callbacks)
    trainer.fit(module, ToyData(num_workers), ckpt_path=str(checkpoint) if checkpoint else None)
    if trainer.is_global_zero:
        steps: Any = trainer.fit_loop.epoch_loop
        final = {
            "weights": module.state_dict(), "optimizer": trainer.optimizers[0].state_dict(), "rows": logger.rows(),
            "schedulers": [c.scheduler.state_dict() for c in trainer.lr_scheduler_configs],
            "draws": [random.random(), float(np.random.rand()), float(torch.rand(()))],
            "counters": [trainer.global_step, trainer.current_epoch, steps._batches_that_stepped],
            "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
        }  # fmt: skip
        torch.save(final, folder / "final.pt")
    return trainer


def resume_callback(**options: Any) -> ResumeCheckpoint:
    return ResumeCheckpoint(**({"every_n_steps": 1, "keep": 2} | options))


def in_child(function: Any, *args: Any, environment: dict[str, str] | None = None, **kwargs: Any) -> Any:
    """Start `function` in a child process (a copy of this one); returns the process."""

    def run() -> None:
        os.environ.update(environment or {})
        torch.set_num_threads(1)
        function(*args, **kwargs)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def exit_code(function: Any, *args: Any, **kwargs: Any) -> int:
    """Run `function` in a child process and return how it ended; negative for a signal."""
    process = in_child(function, *args, **kwargs)
    process.join(120)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError("the child process hangs")
    return int(process.exitcode)


def final(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "final.pt", weights_only=True)


def differences(left: Any, right: Any, where: str = "") -> list[str]:
    """Name everything in which two nested values are not bit-identical."""
    if isinstance(left, dict):
        keys = [f"{where}: keys"] if left.keys() != right.keys() else []
        return keys + [d for k in left if k in right for d in differences(left[k], right[k], f"{where}/{k}")]
    if isinstance(left, list | tuple):
        size = [f"{where}: {len(left)} and {len(right)} long"] if len(left) != len(right) else []
        pairs = zip(left, right, strict=False)
        return size + [d for i, (a, b) in enumerate(pairs) for d in differences(a, b, f"{where}[{i}]")]
    same = torch.equal(left, right) if isinstance(left, Tensor) else left == right
    return [] if same else [f"{where}: {left} and {right}"]


KILL = signal.SIGKILL
