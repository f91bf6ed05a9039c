"""Callbacks that watch a run for the kit or change it on purpose."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils import _pytree as pytree


class Recorder(Callback):
    """Keeps what the checks compare; changes nothing.

    Args:
        folder: Where each rank writes `rank-<n>.pt` at the end of the training; nowhere if None.

    Attributes:
        losses: What `training_step` returned, one number a batch (NaN for nothing).
        positions: After each batch: optimiser steps done, epoch, whether it was the last of its epoch.
        trainable: Parameters that an optimiser holds and that want a gradient when the training starts.
        frozen: All other parameters.
        touched: Parameters that had a gradient other than zero, some time.
        gradients: Those of the first optimiser step, as they come from the backward pass.
        first_update: `state_dict` after the first step is over.
    """

    def __init__(self, folder: str | None = None) -> None:
        self.folder = folder
        self.losses: list[float] = []
        self.positions: list[tuple[int, int, bool]] = []
        self.trainable: set[str] = set()
        self.frozen: set[str] = set()
        self.touched: set[str] = set()
        self.gradients: dict[str, Tensor] = {}
        self.first_update: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in pl_module.named_parameters():
            kind = self.trainable if parameter.requires_grad and id(parameter) in held else self.frozen
            kind.add(name)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        found = {name: p.grad for name, p in pl_module.named_parameters() if p.grad is not None}
        self.touched |= {name for name, grad in found.items() if name not in self.touched and bool(grad.any())}
        if not self.positions and not self.gradients:
            self.gradients = {name: whole(grad) for name, grad in found.items()}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._keep_first_update(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        self.losses.append(float(loss.detach()) if isinstance(loss, Tensor) else float("nan"))
        last = bool(trainer.fit_loop.epoch_loop.batch_progress.is_last_batch)
        self.positions.append((trainer.global_step, trainer.current_epoch, last))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._keep_first_update(pl_module)
        if self.folder is not None:
            kept = {"losses": self.losses, "gradients": self.gradients, "first_update": self.first_update}
            torch.save(kept, Path(self.folder) / f"rank-{trainer.global_rank}.pt")

    def _keep_first_update(self, pl_module: LightningModule) -> None:
        if self.positions and not self.first_update:
            self.first_update = {name: whole(value) for name, value in pl_module.state_dict().items()}


def whole(value: Tensor) -> Tensor:
    """A copy of a tensor; one that is divided over processes is put together, in all of them."""
    return value.full_tensor().detach() if hasattr(value, "full_tensor") else value.detach().clone()


class FixedBatch(Callback):
    """Trains on the first batch again and again."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        step: Any = pl_module.training_step
        kept: list[Any] = []

        @functools.wraps(step)
        def same_batch(batch: Any, *args: Any, **kwargs: Any) -> Any:
            kept[:] = kept or [pytree.tree_map(_copy, batch)]
            return step(pytree.tree_map(_copy, kept[0]), *args, **kwargs)

        pl_module.training_step = same_batch  # type: ignore[method-assign]


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


class NoDropout(Callback):
    """Switches dropout off: its draws are not the same when a batch is divided."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for module in pl_module.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0
            for key in ("drop_prob", "attention_dropout", "dropout"):
                if isinstance(vars(module).get(key), float):
                    setattr(module, key, 0.0)


class KillAt(Callback):
    """Kills the process in the midst of a step, the first time only.

    Args:
        step: Optimiser steps done when it happens.
        marker: File that says that it has happened; each rank appends its number to the name.
    """

    def __init__(self, step: int, marker: str) -> None:
        self.step, self.marker = step, marker

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        marker = Path(f"{self.marker}-{trainer.global_rank}")
        if trainer.global_step >= self.step and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Halves(Callback):
    """Compares the gradient of the first batch with the mean of those of its halves, then goes on as if nothing was.

    Attributes:
        whole: Gradients of the batch.
        halves: Means of the gradients of the halves.
    """

    def __init__(self) -> None:
        self.whole: dict[str, Tensor] = {}
        self.halves: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self.whole:
            return
        self.whole = self._gradients(pl_module, [batch])
        self.halves = self._gradients(
            pl_module, [pytree.tree_map(functools.partial(_half, n=n), batch) for n in (0, 1)]
        )

    def _gradients(self, module: Any, batches: list[Any]) -> dict[str, Tensor]:
        state = {name: value.clone() for name, value in module.state_dict().items()}
        module.log = module.log_dict = lambda *args, **kwargs: None
        try:
            for batch in batches:
                with torch.random.fork_rng(devices=[]):
                    loss = module.training_step(pytree.tree_map(_copy, batch), 0)
                loss = loss["loss"] if isinstance(loss, dict) else loss
                (loss / len(batches)).backward()
                module.load_state_dict(state)
            return {n: p.grad.detach().clone() for n, p in module.named_parameters() if p.grad is not None}
        finally:
            del module.log, module.log_dict
            module.zero_grad()


def _half(leaf: Any, n: int) -> Any:
    if not isinstance(leaf, Tensor) or leaf.ndim == 0:
        return leaf
    return leaf.chunk(2)[n] if len(leaf) > 1 else leaf


class Compile(Callback):
    """Compiles the training step."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            step: Any = pl_module.training_step
            compiled = torch.compile(step)
            pl_module.training_step = functools.wraps(step)(  # type: ignore[method-assign]
                lambda *args, **kwargs: compiled(*args, **kwargs)
            )
