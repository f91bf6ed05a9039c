"""What a run took: seconds, steps, speed, memory, waiting for data."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


def peak_resident_bytes() -> int:
    """Peak resident memory of this process since it began, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes but on macOS


def batch_rows(batch: Any) -> int:
    """Rows of a batch: the first dimension of the first tensor in it; 0 if there is none."""
    if isinstance(batch, torch.Tensor):
        return batch.shape[0] if batch.ndim else 0
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else ()
    return next((rows for part in parts if (rows := batch_rows(part))), 0)


class RunSummary(Callback):
    """Measures each stage of a run without logging anything; `facts()` gives the numbers.

    Per stage `<stage>` of `fit`, `validate`, `test`, `predict`: `<stage>/seconds`; for `fit` also

    * `steps`: optimiser steps of this process; `batches`: batches,
    * `samples_per_second`: rows of all ranks a second, without the first batches and without validation,
    * `data_wait_share`: share of the time of the training loop between the end of a batch and the start of the next
      one, i.e. waiting for the loader, copying to the device and augmenting there; 0 is best,
    * `peak_memory_bytes`: of the GPU (torch's allocator) where there is one, else of the process.

    On a GPU the times are those of the loop: work still queued there counts when the loop waits for it.

    Args:
        skip_batches: Batches at the start (and after each validation: one) that do not count as steady.

    Raises:
        ValueError: If `skip_batches` is negative.
    """

    def __init__(self, skip_batches: int = 5) -> None:
        super().__init__()
        if skip_batches < 0:
            raise ValueError(f"run_summary: skip_batches must not be negative, got {skip_batches}")
        self.skip_batches = skip_batches
        self._facts: dict[str, float] = {}
        self._began: float | None = None
        self._first_step = 0
        self._reset()

    def _reset(self) -> None:
        self._batches, self._rows, self._waited = 0, 0, 0.0
        self._loop_busy, self._loop_waited = 0.0, 0.0
        self._ended: float | None = None
        self._started = 0.0

    def facts(self) -> dict[str, float]:
        """Return the numbers measured so far."""
        return dict(self._facts)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._began = time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._keep_seconds(str(getattr(stage, "value", stage)))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        stage = str(trainer.state.fn.value) if trainer.state.fn else "fit"
        self._keep_seconds(stage)
        if stage == "fit":
            self._finish(trainer)

    def _keep_seconds(self, stage: str) -> None:
        """Note how long a stage took; one that failed before it was set up has no time of its own."""
        if self._began is not None:
            self._facts[f"{stage}/seconds"] = time.perf_counter() - self._began
        self._began = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._reset()
        self._first_step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        if self._ended is not None:
            self._waited = now - self._ended
        self._started = now

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self._batches += 1
        if self._batches > self.skip_batches and self._ended is not None:
            self._rows += batch_rows(batch)
            self._loop_busy += now - self._started
            self._loop_waited += self._waited
        self._ended = now

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = None

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._ended = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer)

    def _finish(self, trainer: Trainer) -> None:
        total = self._loop_busy + self._loop_waited
        self._facts["fit/steps"] = float(trainer.global_step - self._first_step)
        self._facts["fit/batches"] = float(self._batches)
        if total > 0:
            self._facts["fit/samples_per_second"] = self._rows * trainer.world_size / total
            self._facts["fit/data_wait_share"] = self._loop_waited / total
        on_gpu = trainer.strategy.root_device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() if on_gpu else peak_resident_bytes()
        self._facts["fit/peak_memory_bytes"] = float(peak)
