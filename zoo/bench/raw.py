"""A plain PyTorch loop over a LightningModule: the work of the module, without Trainer, callbacks and logging."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from lightning.pytorch.utilities.model_helpers import is_overridden

from zoo.errors import UsageError

#: Hooks of a module that are part of its work; those that it does not have are not called.
HOOKS = (
    "on_train_batch_start", "on_train_batch_end", "on_before_zero_grad", "on_before_backward", "on_after_backward",
    "on_before_optimizer_step", "optimizer_step", "configure_gradient_clipping",
)  # fmt: skip
TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class RawLoop:
    """Trains a copy of a module as one would without Lightning: batch, loss, backward, optimiser, scheduler.

    The copy sees the trainer of the original (its step count, its length), so that it does the work of the same phase
    of the training. Its `log` does nothing. A module with manual optimisation gets bare optimisers from
    `self.optimizers()`; all its work is in `training_step`.

    Args:
        trainer: A trainer in the middle of `fit`, on one device.

    Raises:
        UsageError: If the run needs something that this loop does not do, or if the module cannot be copied.
    """

    def __init__(self, trainer: Trainer) -> None:
        refusal = why_not(trainer)
        if refusal:
            raise UsageError(f"no raw loop: {refusal}", "zoo bench --vs none measures the Trainer alone")
        self.trainer, self.data = trainer, trainer.datamodule  # type: ignore[attr-defined]
        self.module = copy_module(trainer.lightning_module)
        self.device, self.precision = trainer.strategy.root_device, trainer.precision_plugin
        self.hooks = {name for name in HOOKS if is_overridden(name, self.module)}
        # as in Lightning, a hook of the datamodule takes the place of the module's
        self.transfer = {
            name: owner for name in TRANSFER_HOOKS for owner in (self.module, self.data) if is_overridden(name, owner)
        }
        self.takes_index = len(inspect.signature(self.module.training_step).parameters) > 1
        self.optimizers, self.schedulers = _init_optimizers_and_lr_schedulers(self.module)
        self._free_module()
        self.loader = self.data.train_dataloader()
        self._batches = self._endless(trainer.current_epoch)
        self.batch: Any = None
        self._done = 0

    def _free_module(self) -> None:
        """Replace what reaches into the trainer by what a plain loop has."""
        module: Any = self.module
        one_or_all = self.optimizers[0] if len(self.optimizers) == 1 else self.optimizers
        schedulers = [config.scheduler for config in self.schedulers]
        one_or_all_schedulers = schedulers[0] if len(schedulers) == 1 else schedulers or None
        module.log = module.log_dict = lambda *args, **kwargs: None
        module.optimizers = lambda use_pl_optimizer=True: one_or_all
        module.lr_schedulers = lambda: one_or_all_schedulers
        module.manual_backward = lambda loss, *args, **kwargs: loss.backward(*args, **kwargs)
        module.clip_gradients = clip_gradients

    def _endless(self, first_epoch: int) -> Iterator[Any]:
        sampler: Any = getattr(self.loader, "sampler", None)
        for epoch in itertools.count(first_epoch):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
            yield from self.loader

    def fetch(self) -> None:
        """Get the next batch and put it on the device, through the hooks of module or datamodule."""
        batch = next(self._batches)
        before, move, after = (self.transfer.get(name) for name in TRANSFER_HOOKS)
        if before is not None:
            batch = before.on_before_batch_transfer(batch, 0)
        batch = move_data_to_device(batch, self.device) if move is None else self._move(move, batch)
        if after is not None:
            batch = after.on_after_batch_transfer(batch, 0)
        self.batch = self.precision.convert_input(batch)

    def _move(self, owner: Any, batch: Any) -> Any:
        return owner.transfer_batch_to_device(batch, self.device, 0)

    def work(self) -> None:
        """Train on the fetched batch."""
        index = self._done
        self._done += 1
        if "on_train_batch_start" in self.hooks:
            self.module.on_train_batch_start(self.batch, index)
        output = self._optimise(index) if self.module.automatic_optimization else self._forward(index)
        if "on_train_batch_end" in self.hooks:
            self.module.on_train_batch_end(output, self.batch, index)

    def _forward(self, index: int) -> Any:
        with self.precision.forward_context():
            if self.takes_index:
                return self.module.training_step(self.batch, index)
            return self.module.training_step(self.batch)

    def _optimise(self, index: int) -> Any:
        module, optimizer, every = self.module, self.optimizers[0], self.trainer.accumulate_grad_batches
        outputs: list[Any] = []

        def closure() -> Any:
            output = self._forward(index)
            outputs.append(output)
            loss = output["loss"] if isinstance(output, dict) else output
            loss = loss / every if every > 1 else loss
            if index % every == 0:
                self._call("on_before_zero_grad", optimizer)
                module.optimizer_zero_grad(0, index, optimizer)
            self._call("on_before_backward", loss)
            module.backward(loss)
            self._call("on_after_backward")
            if (index + 1) % every == 0:
                self._call("on_before_optimizer_step", optimizer)
                self._clip(optimizer)
            return loss

        if (index + 1) % every:
            closure()
        else:
            if "optimizer_step" in self.hooks:
                module.optimizer_step(0, index, optimizer, closure)
            else:
                optimizer.step(closure)
            self._schedule((index + 1) // every)
        return outputs[0]

    def _call(self, hook: str, *args: Any) -> None:
        if hook in self.hooks:
            getattr(self.module, hook)(*args)

    def _schedule(self, steps: int) -> None:
        for config in self.schedulers:
            if config.interval == "step" and steps % config.frequency == 0:
                self.module.lr_scheduler_step(config.scheduler, None)

    def _clip(self, optimizer: torch.optim.Optimizer) -> None:
        value, algorithm = self.trainer.gradient_clip_val, self.trainer.gradient_clip_algorithm
        if "configure_gradient_clipping" in self.hooks:
            self.module.configure_gradient_clipping(optimizer, value, algorithm)
        elif value:
            clip_gradients(optimizer, value, algorithm)

    def step(self) -> None:
        """One batch from fetching to update."""
        self.fetch()
        self.work()


def why_not(trainer: Trainer) -> str:
    """Say what a raw loop cannot do of this run, `""` if it can do all."""
    if trainer.world_size > 1:
        return f"the run has {trainer.world_size} processes; one device is compared"
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        return f"precision {trainer.precision} scales gradients; use bf16-mixed or 32-true"
    if not hasattr(trainer.datamodule.train_dataloader(), "__iter__"):  # type: ignore[attr-defined]
        return "the datamodule has several loaders"
    return ""


def copy_module(module: LightningModule) -> LightningModule:
    """Return a copy of a module that knows the same trainer.

    Raises:
        UsageError: If it holds something that cannot be copied.
    """
    try:
        twin = copy.deepcopy(module)  # leaves out the trainer
    except (RuntimeError, TypeError) as error:
        raise UsageError(
            f"no raw loop: {type(module).__name__} cannot be copied: {error}",
            "keep no tensors with a graph and no open files in the module, or use --vs none",
        ) from error
    twin.trainer = module.trainer
    twin.train()
    return twin


def clip_gradients(
    optimizer: torch.optim.Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: Any = None
) -> None:
    """Clip the gradients of an optimiser's parameters by norm (default) or value."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not gradient_clip_val:
        return
    if str(getattr(gradient_clip_algorithm, "value", gradient_clip_algorithm)) == "value":
        torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
    else:
        torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)
