"""Stops a training whose loss or metrics are no numbers any more."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from zoo.errors import RunError


class NonFiniteError(RunError):
    """The loss or a metric became infinite or not a number.

    Args:
        name: `loss`, or the name of the metric.
        value: Its value.
        step: Optimiser steps done before it was computed, the step it is logged with.
        checkpoint: The last good checkpoint, or None.
    """

    def __init__(self, name: str, value: float, step: int, checkpoint: Any = None) -> None:
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint yet"
        super().__init__(
            f"{name} is {value} at step {step}; {kept}",
            "usual causes: learning rate too high, a division by zero, float16 without scaling, bad input",
        )
        self.name, self.value, self.step, self.checkpoint = name, value, step, checkpoint


class NonFiniteGuard(Callback):
    """Raises `NonFiniteError` when the loss, or a metric logged in training or validation, is not finite.

    It looks before checkpoints are written, so that they stay good. On a CPU each loss is looked at. On a GPU every
    n-th loss is fetched without waiting for the device and looked at n batches later; it is reported with the step it
    belongs to. Checkpoints written in between may be bad: n should be small against the interval of the checkpoints.

    Args:
        every_n_steps: On a GPU, batches between two looks; logged metrics are looked at as often.
        ignore: Names of metrics that may be infinite or missing values.

    Raises:
        ValueError: If `every_n_steps` is below 1.
    """

    def __init__(self, every_n_steps: int = 10, ignore: list[str] | None = None) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"nonfinite_guard: every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps, self.ignore = every_n_steps, frozenset(ignore or ())
        self._pending: deque[tuple[int, Tensor, Any]] = deque()
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pending.clear()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            loss = loss.detach()
            if loss.device.type == "cpu":
                self._check(trainer, "loss", loss, self._step)
            elif batch_idx % self.every_n_steps == 0:
                self._fetch(trainer, loss)
        if (batch_idx + 1) % self.every_n_steps == 0:
            self._check_metrics(trainer)

    def _fetch(self, trainer: Trainer, loss: Tensor) -> None:
        """Look at the values asked for earlier and ask for this one."""
        self._check_pending(trainer)
        aside = torch.empty(loss.shape, dtype=loss.dtype, pin_memory=True)
        aside.copy_(loss, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._pending.append((self._step, aside, arrived))

    def _check_pending(self, trainer: Trainer) -> None:
        while self._pending:
            step, value, arrived = self._pending.popleft()
            arrived.synchronize()
            self._check(trainer, "loss", value, step)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check_pending(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._check_metrics(trainer)

    def _check_metrics(self, trainer: Trainer) -> None:
        metrics: dict[str, Any] = dict(trainer.callback_metrics)
        on_cpu = {k: v for k, v in metrics.items() if isinstance(v, Tensor) and v.device.type == "cpu"}
        on_gpu = {k: v for k, v in metrics.items() if isinstance(v, Tensor) and v.device.type != "cpu"}
        if on_gpu:  # one transfer for all
            values = torch.stack([v.detach().float().mean() for v in on_gpu.values()]).cpu()
            on_cpu |= dict(zip(on_gpu, values, strict=True))
        for name, value in on_cpu.items():
            if name not in self.ignore:
                self._check(trainer, name, value, self._step)

    def _check(self, trainer: Trainer, name: str, value: Tensor, step: int) -> None:
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise NonFiniteError(name, float(value.float().mean()), step, self._last_checkpoint(trainer))

    def _last_checkpoint(self, trainer: Trainer) -> Any:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            path = getattr(callback, "last_path", None) or getattr(callback, "best_model_path", None)
            if path:
                return path
        return None
