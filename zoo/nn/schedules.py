"""Schedules as functions of the step, and the learning-rate schedule most methods share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def total_steps(trainer: Trainer) -> int:
    """Return the number of optimiser steps of a fit.

    Raises:
        ValueError: If the fit has no end, so that no schedule can be laid over it.
    """
    steps = trainer.estimated_stepping_batches
    if not 0 < steps < float("inf"):
        raise ValueError("the schedule needs an end: set trainer.max_steps or trainer.max_epochs")
    return int(steps)


def linear_ramp(step: int, steps: int, start: float, end: float) -> float:
    """Go from `start` at step 0 to `end` at `steps` in a straight line; `end` afterwards."""
    if step >= steps:
        return end
    return start + (end - start) * step / steps


def cosine_ramp(step: int, steps: int, start: float, end: float) -> float:
    """Go from `start` at step 0 to `end` at `steps` on half a cosine; `end` afterwards."""
    if step >= steps:
        return end
    return end + (start - end) * (1 + math.cos(math.pi * step / steps)) / 2


def warmup_cosine(step: int, steps: int, warmup_steps: int = 0, final: float = 0.0) -> float:
    """Factor of the learning rate: linear warm-up, then a cosine down to `final`.

    Args:
        step: Number of optimiser steps done.
        steps: Number of steps of the whole schedule.
        warmup_steps: Steps of the warm-up. Its first step already moves: the factor is `1 / warmup_steps`.
        final: Factor at the end.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return cosine_ramp(step - warmup_steps, max(steps - warmup_steps, 1), 1.0, final)


def warmup_cosine_lr(optimizer: Optimizer, steps: int, warmup_steps: int = 0, final: float = 0.0) -> LambdaLR:
    """Scheduler that applies `warmup_cosine` to every parameter group; call it once a step.

    In Lightning: `{"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup_cosine_lr(...), "interval": "step"}}`
    with `steps = total_steps(self.trainer)`.
    """
    return LambdaLR(optimizer, lambda step: warmup_cosine(step, steps, warmup_steps, final))


def trapezoid(step: int, steps: int, warmup_steps: int = 0, decay_from: float = 0.5, final: float = 0.0) -> float:
    """Factor of the learning rate: linear warm-up, constant, then a line down to `final`.

    Args:
        step: Number of optimiser steps done.
        steps: Number of steps of the whole schedule.
        warmup_steps: Steps of the warm-up, as in `warmup_cosine`.
        decay_from: Fraction of the steps after which the factor falls.
        final: Factor at the end.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    start = int(steps * decay_from)
    return 1.0 if step < start else linear_ramp(step - start, max(steps - start, 1), 1.0, final)
