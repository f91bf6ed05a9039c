"""Progress for people at a terminal, and a line now and then for log files."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar

#: Metrics in a line.
SHOWN = 6


class Progress(ProgressBar):
    """Rich progress bars at a terminal; elsewhere one line with the metrics after each evaluation and at most every
    `seconds` seconds.

    Args:
        seconds: Time between two lines in a log file.
    """

    def __new__(cls, seconds: float = 30.0) -> Any:
        if cls is Progress and sys.stdout.isatty():
            return RichProgressBar(leave=False)
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
        metrics = {k: float(v) for k, v in trainer.progress_bar_metrics.items() if k != "v_num"}
        shown = metrics or {k: float(v) for k, v in trainer.callback_metrics.items()}
        steps = trainer.estimated_stepping_batches if trainer.training else None
        total = f"/{int(steps)}" if steps not in (None, float("inf")) else ""
        # short names are the main ones; all of them are in metrics.csv
        text = "  ".join(f"{key} {shown[key]:.4g}" for key in sorted(sorted(shown, key=len)[:SHOWN]))
        elapsed = f"  {self._last - self._started:.0f} s" if self._started else ""
        print(f"step {trainer.global_step}{total}{elapsed}  {text}", flush=True)
