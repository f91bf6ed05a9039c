"""Checkpoints from which a killed run goes on as if nothing had happened."""

from __future__ import annotations

import errno
import math
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks import checkpoint_files
from callbacks.boundaries import epoch_is_complete, is_between_optimizer_steps, watch
from callbacks.checkpoint_files import checkpoints_newest_first, is_readable, newest_checkpoint, step_of
from callbacks.rng import gathered, rng_state, set_rng_state

__all__ = ["ResumeCheckpoint", "checkpoints_newest_first", "is_readable", "newest_checkpoint"]


class ResumeCheckpoint(Callback):
    """Writes `checkpoints/step=<n>.ckpt`; on a CPU, `fit(ckpt_path=...)` repeats the uninterrupted run bit for bit.

    The state is taken when everything of a step is over: after the hooks of the module, logging and validation. Where a
    step ends an epoch it is taken after the end of the epoch, so that no validation is lost or run twice. Besides what
    Lightning stores there are the generators of all ranks and the metrics that callbacks monitor. An error in
    the middle of a step writes nothing: such a state cannot be continued, the one before can. A write that fails, on
    whichever rank, is reported and tried again at the next occasion; the earlier files stay.

    The newest checkpoint is that of the highest step. A resume passes over damaged ones; those of later steps than the
    one it goes on from are deleted with its first new one, lest pruning keep them and delete good ones.

    Not kept across a resume in mid-epoch: the running means of training metrics logged with `on_epoch=True`.

    Args:
        every_n_steps: Optimiser steps between two checkpoints; 0 for none but those of the epochs.
        every_n_epochs: Epochs between two checkpoints at the end of an epoch; 0 for none. The end of the training
            always writes one.
        keep: Newest checkpoints that stay. Those of later steps than the present one, which another run has left,
            are the first to go.
        dirpath: Directory; `<trainer.default_root_dir>/checkpoints` if None.

    Raises:
        ValueError: For negative intervals or `keep` below 1.
    """

    def __init__(
        self, every_n_steps: int = 500, every_n_epochs: int = 1, keep: int = 2, dirpath: str | None = None
    ) -> None:
        super().__init__()
        limits = {"every_n_steps": (every_n_steps, 0), "every_n_epochs": (every_n_epochs, 0), "keep": (keep, 1)}
        for name, (value, least) in limits.items():
            if value < least:
                raise ValueError(f"resume_checkpoint: {name} must be at least {least}, got {value}")
        self.every_n_steps, self.every_n_epochs, self.keep, self.dirpath = every_n_steps, every_n_epochs, keep, dirpath
        self.last_path: Path | None = None
        self._kind: str | None = None  # what the state that is being saved is
        self._clean = False  # whether the run stands between two batches of an epoch
        self._tried, self._saved = 0, 0  # steps of the last attempt and of the last file
        self._failure: Exception | None = None  # what the last save ended with
        self._before_validation: dict[str, Any] | None = None
        self._resume: dict[str, Any] | None = None
        self._resumed_from: Path | None = None  # where that is a file of our directory
        self._trusted: float = math.inf  # last step whose file need not be read again after the next save

    def directory(self, trainer: Trainer) -> Path:
        """Where the checkpoints of this trainer are."""
        return Path(self.dirpath) if self.dirpath else Path(trainer.default_root_dir) / "checkpoints"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._clean, self._resume, self._tried, self._saved = False, None, 0, 0
            self._resumed_from, self._trusted = None, math.inf
            watch(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clean = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._clean = False
        self.last_path = self.last_path or self._resumed_from

    def on_before_validation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what a checkpoint written during the validation needs to run it again from its start."""
        progress: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress
        self._before_validation = {"rng": rng_state(), "progress": progress.state_dict()}

    def on_step_boundary(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before_validation = None
        if epoch_is_complete(trainer) or not is_between_optimizer_steps(trainer):
            return
        self._clean = True
        last = bool(trainer.fit_loop.epoch_loop.done)
        if last or self._due(trainer.global_step):
            self.save(trainer, "step", final=last)

    def on_epoch_boundary(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if epoch_is_complete(trainer):
            due = self.every_n_epochs > 0 and trainer.current_epoch % self.every_n_epochs == 0
            if due or self._due(trainer.global_step):
                self.save(trainer, "epoch")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._saved != trainer.global_step and epoch_is_complete(trainer):
            self.save(trainer, "epoch", final=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        alone = trainer.world_size == 1  # the other ranks would not come to the save
        if isinstance(exception, KeyboardInterrupt):
            return  # it can come in the middle of anything, and whoever presses Ctrl-C twice does not want to wait
        if alone and self._clean and self._saved != trainer.global_step and exception is not self._failure:
            try:
                self.save(trainer, "step")
            except Exception as error:  # other callbacks have to hear of the exception, and it is the one to be told
                warnings.warn(f"no checkpoint at the end of the run: {error}", RuntimeWarning, stacklevel=2)

    def _due(self, step: int) -> bool:
        return self.every_n_steps > 0 and step // self.every_n_steps > self._tried // self.every_n_steps

    def save(self, trainer: Trainer, kind: str, final: bool = False) -> Path | None:
        """Write a checkpoint now; every rank has to call it, and only at a boundary.

        Args:
            trainer: The trainer.
            kind: What the state is: `step` (between two batches of an epoch), `epoch` (between two epochs) or
                `validation` (a step is over, its validation will be run again from the start).
            final: Whether a write that fails is an error; else it is a warning.

        Returns:
            The file, or None if it could not be written.

        Raises:
            OSError: If the file could not be written and `final` is set; on every rank, whichever it was that failed.
        """
        for logger in trainer.loggers:
            getattr(logger, "flush", logger.save)()  # the file of the metrics must not lag behind
        path = self.directory(trainer) / f"step={trainer.global_step}.ckpt"
        connector: Any = trainer._checkpoint_connector
        self._kind, self._failure, self._tried = kind, None, trainer.global_step
        not_written: OSError | None = None
        try:
            checkpoint = connector.dump_checkpoint(weights_only=False)
            trainer.strategy.save_checkpoint(checkpoint, str(path))
        except OSError as error:
            self._failure = not_written = error
        except Exception as error:
            self._failure = error
            raise
        finally:
            self._kind = None
        # a rank that took this for a success while another one failed would leave it alone in the next save
        if not trainer.strategy.reduce_boolean_decision(not_written is None):
            cause = not_written or "another process failed to write it"
            message = f"the checkpoint {path} could not be written ({cause}); the last one is {self.last_path}"
            if final:
                self._failure = OSError(not_written.errno if not_written else errno.EIO, message)
                raise self._failure
            warnings.warn(f"{message}; the training goes on and will try again", RuntimeWarning, stacklevel=2)
            return None
        self.last_path, self._saved = path, trainer.global_step
        if trainer.is_global_zero:
            self._tidy(path)
        self._trusted = math.inf
        return path

    def _tidy(self, path: Path) -> None:
        """Delete what is not to be kept beside a file that has been written just now."""
        others = [other for other in checkpoint_files.resume_files(path.parent) if other != path]
        damaged = [other for other in others if step_of(other) > self._trusted and not is_readable(other)]
        kept = [other for other in others if other not in damaged]
        kept.sort(key=lambda other: step_of(other) > step_of(path))  # our own past first, the newest of it first
        for other in damaged + kept[self.keep - 1 :]:
            checkpoint_files.remove(other)

    def state_dict(self) -> dict[str, Any]:
        before = self._before_validation if self._kind == "validation" else None
        return {"kind": self._kind, "rng": gathered(before["rng"] if before else rng_state())}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Bring the loops' counters into the form in which Lightning continues at this very place."""
        loops = checkpoint["loops"]["fit_loop"]
        if self._kind == "validation" and self._before_validation:
            loops["epoch_loop.val_loop.batch_progress"] = self._before_validation["progress"]
        if self._kind == "epoch":
            # what Lightning does itself when an epoch begins, but not when it begins after a resume
            loops["epoch_loop.batch_progress"] |= {"is_last_batch": False}
            for key in ("batch_progress", "scheduler_progress", "automatic_optimization.optim_progress"):
                _clear(loops[f"epoch_loop.{key}"], "current")
            _clear(loops["epoch_loop.val_loop.batch_progress"], "total")
        if self._kind is not None:
            state = checkpoint["callbacks"][self.state_key]
            state["metrics"] = {name: value.cpu() for name, value in trainer.callback_metrics.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resume = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After a checkpoint that another callback wrote somewhere in a step, Lightning's own resume has to do."""
        self._rewind(trainer)  # a run without a checkpoint starts again from its beginning
        source = Path(trainer.ckpt_path) if trainer.ckpt_path else None
        if source is not None and source.parent.resolve() == self.directory(trainer).resolve():
            self.last_path = self._resumed_from = source
            self._trusted = trainer.global_step
        if self._resume is None:
            return
        self._tried = self._saved = trainer.global_step
        if self._resume["kind"] is None:
            self._restore(trainer)

    def on_epoch_opening(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._resume is not None and self._resume["kind"] == "epoch":
            self._restore(trainer)
            self._resume = {"kind": "epoch opened"}

    def on_batches_opening(self, trainer: Trainer, pl_module: LightningModule, fetcher: Any) -> None:
        if self._resume is None:
            return
        fit: Any = trainer.fit_loop
        if fit._combined_loader_states_to_load:
            # Lightning forgets them when `configure_optimizers` has asked for `estimated_stepping_batches`
            fit._combined_loader._load_state_dicts(fit._combined_loader_states_to_load)
            fit._combined_loader_states_to_load = []
            iter(fetcher)
        if self._resume["kind"] == "epoch opened":
            fit._resuming_from_checkpoint = False  # the loop makes a new iterator, as at every epoch
            self._resume = None
            _go_on_as_usual(fit)

    def on_batches_opened(self, trainer: Trainer, pl_module: LightningModule, fetcher: Any) -> None:
        if self._resume is None:
            return
        kind = self._resume["kind"]
        # Lightning would run the last validation again or skip the next one, miscount the logged steps and leave out
        # plateau schedulers
        _go_on_as_usual(trainer.fit_loop)
        self._restore(trainer)
        if kind == "validation":
            # a stop right after this validation needs a file of its own: this one would run the validation again
            self.last_path = None
            trainer.fit_loop.epoch_loop.on_advance_end(fetcher)

    def _restore(self, trainer: Trainer) -> None:
        state, self._resume = self._resume or {}, None
        rng = state["rng"]
        if trainer.global_rank < len(rng):
            set_rng_state(rng[trainer.global_rank])
        connector: Any = trainer._logger_connector
        for name, value in state.get("metrics", {}).items():
            connector._callback_metrics[name] = value.to(trainer.strategy.root_device)

    def _rewind(self, trainer: Trainer) -> None:
        """Tell the loggers from which step on everything will be logged again."""
        repeated = trainer.fit_loop.epoch_loop._batches_that_stepped
        # the metrics of a step are logged before its validation
        repeated += (self._resume or {}).get("kind") == "validation"
        for logger in trainer.loggers:
            if hasattr(logger, "rewind"):
                logger.rewind(repeated)


def _go_on_as_usual(fit: Any) -> None:
    """End the restart mode of the loops; the setter of the fit loop would not obey where steps are counted."""
    fit._restarting = False
    fit.epoch_loop.restarting = False


def _clear(progress: dict[str, Any], which: str) -> None:
    """Set the counters called `which` at any depth to zero."""
    for key, value in progress.items():
        if isinstance(value, dict):
            if key == which:
                value.update(dict.fromkeys(value, 0))
            else:
                _clear(value, which)
