"""Progress for people at a terminal, and a line now and then for log files."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

from callbacks.boundaries import shown_step

#: Metrics in a line, half as many beside a bar; all of them are in metrics.csv.
SHOWN = 6


def main_metrics(trainer: pl.Trainer, count: int) -> dict[str, float]:
    """Return the few metrics to show: those of the progress bar, else the `count` with the shortest names."""
    metrics = {k: v for k, v in trainer.progress_bar_metrics.items() if k != "v_num"} or trainer.callback_metrics
    return {k: float(metrics[k]) for k in sorted(sorted(metrics, key=len)[:count])}


class Bars(RichProgressBar):
    """Lightning's bars with the main metrics, read once a second, and the number of epochs where steps limit it."""

    def __init__(self) -> None:
        super().__init__(leave=False)
        self._read = 0.0
        self._values: dict[str, float] = {}

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Metrics of a moment ago."""
        if time.monotonic() - self._read >= 1.0:
            self._read, self._values = time.monotonic(), main_metrics(trainer, SHOWN // 2)
        return {key: f"{value:.4g}" for key, value in self._values.items()}

    def _get_train_description(self, current_epoch: int) -> str:
        steps = self.trainer.estimated_stepping_batches
        if self.trainer.max_steps < 0 or steps == float("inf"):
            return super()._get_train_description(current_epoch)
        epochs = math.ceil(int(steps) * self.trainer.accumulate_grad_batches / self.trainer.num_training_batches)
        return f"Epoch {current_epoch}/{epochs - 1}"


class Progress(ProgressBar):
    """Rich progress bars at a terminal; elsewhere one line with the metrics after each evaluation and at most every
    `seconds` seconds.

    Args:
        seconds: Time between two lines in a log file.
    """

    def __new__(cls, seconds: float = 30.0) -> Any:
        if cls is Progress and sys.stdout.isatty():
            return Bars()
        return super().__new__(cls)

    def __init__(self, seconds: float = 30.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._last = self._started = 0.0

    def disable(self) -> None:
        self.seconds = float("inf")

    def enable(self) -> None:
        """Lines are on from the start."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last = self._started = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if time.monotonic() - self._last >= self.seconds:
            self._line(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._line(trainer)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._line(trainer)

    def _line(self, trainer: pl.Trainer) -> None:
        if not trainer.is_global_zero or self.seconds == float("inf"):
            return
        self._last = time.monotonic()
        steps = trainer.estimated_stepping_batches if trainer.training else None
        total = f"/{int(steps)}" if steps not in (None, float("inf")) else ""
        text = "  ".join(f"{key} {value:.4g}" for key, value in main_metrics(trainer, SHOWN).items())
        elapsed = f"  {self._last - self._started:.0f} s" if self._started else ""
        print(f"step {shown_step(trainer)}{total}{elapsed}  {text}", flush=True)
