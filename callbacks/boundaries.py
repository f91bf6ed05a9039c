"""The moments between two training steps, which Lightning has no callback hook for.

`on_train_batch_end` of a callback runs before the module's own hook (where an EMA is updated), before the metrics of
the step are logged and before validation; `on_train_batch_start` runs after the next batch was fetched and augmented. A
state that is to be continued exactly has to be taken in between. After `watch(trainer)` every callback of the trainer
that has one of these methods is called, each with `(trainer, pl_module)`:

* `on_before_validation`: a validation within `fit` is about to start.
* `on_step_boundary`: everything of a batch is over, validation and logging included; the next batch is not fetched.
* `on_epoch_boundary`: everything of an epoch is over; the next one has not begun.
* `on_epoch_opening`: an epoch is about to start or to be continued.
* `on_batches_opening`, `on_batches_opened`: before and after the loop over the batches of an epoch has got its
  iterator; the data fetcher is a third argument.

It wraps four methods of Lightning's loops. This file and `resume_checkpoint.py` are the only ones that know the loops.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning
from lightning.pytorch import Trainer


class _Boundaries:
    def __init__(self, trainer: Trainer) -> None:
        fit: Any = trainer.fit_loop
        steps = fit.epoch_loop
        self.trainer, self.steps = trainer, steps
        self._open_epoch, self._close_epoch = fit.on_advance_start, fit.on_advance_end
        self._open_batches, self._close_batch = steps.on_run_start, steps.on_advance_end
        fit.on_advance_start, fit.on_advance_end = self.open_epoch, self.close_epoch
        steps.on_run_start, steps.on_advance_end = self.open_batches, self.close_batch

    def call(self, hook: str, *args: Any) -> None:
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks:
            if hasattr(type(callback), hook):
                getattr(callback, hook)(self.trainer, self.trainer.lightning_module, *args)

    def open_epoch(self) -> None:
        self.call("on_epoch_opening")
        self._open_epoch()

    def open_batches(self, fetcher: Any) -> None:
        self.call("on_batches_opening", fetcher)
        self._open_batches(fetcher)
        self.call("on_batches_opened", fetcher)

    def close_batch(self, fetcher: Any) -> None:
        if not self.steps._skip_next_val and self.steps._should_check_val_fx(fetcher):
            self.call("on_before_validation")
        self._close_batch(fetcher)
        self.call("on_step_boundary")

    def close_epoch(self) -> None:
        self._close_epoch()
        self.call("on_epoch_boundary")


def watch(trainer: Trainer) -> None:
    """Call the hooks above from now on; a second call for the same trainer does nothing.

    Raises:
        RuntimeError: If this release of Lightning has other loops than those that the hooks were written for.
    """
    fit: Any = trainer.fit_loop
    if isinstance(getattr(fit.on_advance_end, "__self__", None), _Boundaries):
        return
    try:
        _Boundaries(trainer)
    except AttributeError as error:
        raise RuntimeError(
            f"the loops of lightning {lightning.__version__} are not those that exact resume was written for: {error}"
        ) from error


def epoch_is_complete(trainer: Trainer) -> bool:
    """Whether the last batch of the present epoch has been trained on."""
    steps: Any = trainer.fit_loop.epoch_loop
    return bool(steps._num_ready_batches_reached())


def is_between_optimizer_steps(trainer: Trainer) -> bool:
    """Whether no gradients are accumulated that the next step would need."""
    steps: Any = trainer.fit_loop.epoch_loop
    return not steps._should_accumulate()


def log_at(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
    """Log what an evaluation gives at the step and epoch of the checkpoint; Lightning would log it at step 0."""
    connector: Any = trainer._logger_connector
    usual = connector.log_metrics
    step, epoch = int(checkpoint.get("global_step", 0)), float(checkpoint.get("epoch", 0))
    loop = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.state_dict", {})
    logged_at = int(loop.get("_batches_that_stepped", step))

    def log_metrics(metrics: Mapping[str, Any], step: int | None = None) -> None:
        if metrics and step is None and "step" not in metrics:
            metrics, step = {"epoch": epoch, **metrics}, logged_at
        usual(metrics, step=step)

    connector.log_metrics = log_metrics
    trainer.zoo_step = step  # type: ignore[attr-defined]


def shown_step(trainer: Trainer) -> int:
    """Optimiser steps of the weights at hand: those of the training, or of the checkpoint that is evaluated."""
    return trainer.global_step if trainer.state.fn == "fit" else getattr(trainer, "zoo_step", trainer.global_step)
