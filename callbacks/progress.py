"""Progress for people at a terminal, and a line now and then for log files."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from torch import Tensor

from zoo.output import short

#: Metrics in a line; all of them are in metrics.csv.
SHOWN = 6
#: Metrics beside a bar, fewer where the terminal is narrow: columns of the bar itself, and of one metric.
BESIDE, BAR_COLUMNS, METRIC_COLUMNS = 3, 65, 22


class News:
    """Which metrics were logged since a line was shown, and since an evaluation began.

    A value that is logged again has memory of its own; one that is only remembered stays where it was.
    """

    def __init__(self) -> None:
        self._shown: Mapping[str, Tensor] = {}
        self._before: Mapping[str, Tensor] = {}

    def evaluation_starts(self, trainer: pl.Trainer) -> None:
        """Remember what is known before a validation."""
        self._before = dict(trainer.callback_metrics)

    def take(self, trainer: pl.Trainer, evaluated: bool = False) -> dict[str, float]:
        """Return the few metrics of a line, those of the validation first where it has just ended.

        Metrics with short names are the main ones.
        """
        now = dict(trainer.callback_metrics)
        fresh = [name for name in now if not _same(self._shown.get(name), now[name])]
        new = [name for name in fresh if evaluated and not _same(self._before.get(name), now[name])]
        self._shown = now
        names = [*sorted(new, key=len), *sorted((name for name in fresh if name not in new), key=len)]
        return {name: float(now[name]) for name in sorted(names[:SHOWN])}


def _same(old: Tensor | None, new: Tensor) -> bool:
    # Lightning hands out another view of the stored value each time; the old one keeps its memory from being used anew
    return old is not None and old.data_ptr() == new.data_ptr()


def step_text(trainer: pl.Trainer, started: float, metrics: Mapping[str, float]) -> str:
    """One line about a training: step, seconds since `started`, metrics."""
    steps = trainer.estimated_stepping_batches
    total = "" if steps == float("inf") else f"/{int(steps)}"
    text = "  ".join(f"{name} {short(value)}" for name, value in metrics.items())
    return f"step {trainer.global_step}{total}  {time.monotonic() - started:.0f} s  {text}".rstrip()


class Bars(RichProgressBar):
    """Lightning's bars with the main training metrics, read once a second, and the number of epochs where steps limit
    it; above them stays a line for each validation."""

    def __init__(self) -> None:
        super().__init__(leave=False)
        self._read = self._started = 0.0
        self._values: dict[str, float] = {}
        self._news = News()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.monotonic()
        super().on_train_start(trainer, pl_module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._news.evaluation_starts(trainer)
        super().on_validation_start(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self.progress is not None and self.is_enabled:
            line = step_text(trainer, self._started, self._news.take(trainer, evaluated=True))
            self.progress.console.print(line, markup=False, highlight=False)
        super().on_validation_end(trainer, pl_module)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Training metrics of a moment ago, as many as there is room for."""
        if trainer.training and time.monotonic() - self._read >= 1.0:
            width = self.progress.console.width if self.progress is not None else 80
            room = max(0, min(BESIDE, (width - BAR_COLUMNS) // METRIC_COLUMNS))
            metrics = {k: v for k, v in trainer.callback_metrics.items() if k.startswith("train/")}
            names = sorted(sorted(metrics, key=len)[:room])
            self._read, self._values = time.monotonic(), {name: float(metrics[name]) for name in names}
        return {key: short(value) for key, value in self._values.items()}

    def _get_train_description(self, current_epoch: int) -> str:
        steps = self.trainer.estimated_stepping_batches
        if self.trainer.max_steps < 0 or steps == float("inf"):
            return super()._get_train_description(current_epoch)
        epochs = math.ceil(int(steps) * self.trainer.accumulate_grad_batches / self.trainer.num_training_batches)
        return f"Epoch {current_epoch}/{epochs - 1}"


class Progress(ProgressBar):
    """Rich progress bars at a terminal; elsewhere one line on standard error after each validation and at most every
    `seconds` seconds, with what was logged since the line before; evaluations count their batches.

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
        self._last = self._started = self._evaluation_started = 0.0
        self._evaluated_batches = 0
        self._news = News()

    def disable(self) -> None:
        self.seconds = float("inf")

    def enable(self) -> None:
        """Lines are on from the start."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._last = self._started = time.monotonic()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self._due():
            self._print(trainer, step_text(trainer, self._started, self._news.take(trainer)))

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._news.evaluation_starts(trainer)
        self._begin(trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(trainer)

    on_predict_start = on_test_start

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._count(trainer, "validating", trainer.num_val_batches)

    def on_test_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._count(trainer, "testing", trainer.num_test_batches)

    def on_predict_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self._count(trainer, "predicting", trainer.num_predict_batches)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._print(trainer, step_text(trainer, self._started, self._news.take(trainer, evaluated=True)))

    def _begin(self, trainer: pl.Trainer) -> None:
        self._evaluation_started, self._evaluated_batches = time.monotonic(), 0
        if trainer.state.fn != "fit":
            self._last = self._evaluation_started

    def _count(self, trainer: pl.Trainer, doing: str, batches: Sequence[int | float]) -> None:
        self._evaluated_batches += 1
        if self._due() and not trainer.sanity_checking:
            total = sum(batches)
            of = "" if total == float("inf") else f"/{int(total)}"
            seconds = time.monotonic() - self._evaluation_started
            self._print(trainer, f"{doing} {self._evaluated_batches}{of} batches  {seconds:.0f} s")

    def _due(self) -> bool:
        return time.monotonic() - self._last >= self.seconds

    def _print(self, trainer: pl.Trainer, text: str) -> None:
        if trainer.is_global_zero and self.seconds != float("inf"):
            self._last = time.monotonic()
            print(text, file=sys.stderr, flush=True)
