"""Options of the optimiser that a run is continued with, where they differ from those that it was begun with."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class NewOptions(Callback):
    """Let the options of a config win over those that a checkpoint restores with the state of the optimiser.

    Lightning builds the optimisers from the config and then loads their state, in which learning rates and decays of
    the old config are stored; a changed option would be shown and have no effect. Only used where an option of the
    model has changed: a resume with the same options restores what was stored, to the bit.

    A learning rate that follows a schedule is where the schedule is, times the ratio of the new and the old peak.
    One that is lowered on plateaus stays where it has come to.
    """

    def __init__(self) -> None:
        self._built: list[list[dict[str, Any]]] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The optimisers are built, and nothing is restored yet."""
        plain = (bool, int, float, tuple)
        self._built = [
            [{key: value for key, value in group.items() if isinstance(value, plain)} for group in opt.param_groups]
            for opt in trainer.optimizers
        ]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put back what the config says."""
        lowered = [config.scheduler.optimizer for config in trainer.lr_scheduler_configs if config.reduce_on_plateau]
        for optimizer, built in zip(trainer.optimizers, self._built, strict=True):
            fixed = any(optimizer is other for other in lowered)
            for group, wanted in zip(optimizer.param_groups, built, strict=True):
                rate = group["lr"] if fixed else _rate(group, wanted)
                group.update({key: value for key, value in wanted.items() if key != "lr"})
                group["lr"] = rate
        for config in trainer.lr_scheduler_configs:
            groups = config.scheduler.optimizer.param_groups
            if hasattr(config.scheduler, "base_lrs"):
                config.scheduler.base_lrs = [group["initial_lr"] for group in groups]
            config.scheduler._last_lr = [group["lr"] for group in groups]


def _rate(group: dict[str, Any], wanted: dict[str, Any]) -> Any:
    """Return the learning rate of a restored group under new options."""
    if "initial_lr" not in group or "initial_lr" not in wanted:  # no schedule
        return wanted.get("lr", group["lr"])
    old, new = group["initial_lr"], wanted["initial_lr"]
    if old == new:
        return group["lr"]
    return group["lr"] * new / old if old else wanted["lr"]
