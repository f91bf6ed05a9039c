"""Ending a run in good order when the machine is taken away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.boundaries import epoch_is_complete, is_between_optimizer_steps, watch
from callbacks.resume_checkpoint import ResumeCheckpoint

#: 128 + SIGTERM, what a shell reports for a terminated process.
EXIT_CODE = 143
#: 128 + SIGINT, after Ctrl-C.
INTERRUPTED = 130

#: Written by the handler itself: `print` cannot be called while another `print` is under way.
NOTICE = b"Ctrl-C: stopping after this step; once more to stop at once\n"


class Preempted(SystemExit):
    """The run was asked to stop and has written a checkpoint; leaves the process with exit code 143 or 130.

    Args:
        path: The checkpoint, or None if it could not be written.
        step: Optimiser steps done.
        code: The exit code.
    """

    def __init__(self, path: Path | None, step: int, code: int = EXIT_CODE) -> None:
        super().__init__(code)
        self.path, self.step = path, step


class Preemption(Callback):
    """On SIGTERM, SIGUSR1 or Ctrl-C: finish the step, write a checkpoint, leave with exit code 143, after Ctrl-C 130.

    The handler sets a flag only. The ranks agree on it between two steps and during validations; all of them stop at
    the same step. A validation that is interrupted is run again from its start by the resumed run. Needs the callback
    `resume_checkpoint`, which writes the file. While the training runs, it takes the place of Lightning's handlers,
    which write checkpoints from within the handler.

    A second Ctrl-C raises `KeyboardInterrupt` at once, and so does the first before the training has begun. A terminal
    sends Ctrl-C to the loader workers, too; they go on, since the step needs their batches.

    In a SLURM batch job the signal SIGUSR1 (`#SBATCH --signal=SIGUSR1@120`) also puts the job into the queue again.

    Args:
        signals: Names of the signals, of `SIGTERM`, `SIGUSR1`, `SIGUSR2` and `SIGINT` (Ctrl-C); the first, second and
            last if None.
        every_n_steps: Steps (and batches of a validation) between two agreements of the ranks. A single process looks
            at its flag after each.
        requeue: Whether to requeue a SLURM job.

    Raises:
        ValueError: For an unknown signal, an interval below 1, or without `resume_checkpoint`.
    """

    def __init__(self, signals: list[str] | None = None, every_n_steps: int = 10, requeue: bool = True) -> None:
        super().__init__()
        names = ["SIGTERM", "SIGUSR1", "SIGINT"] if signals is None else signals
        unknown = [name for name in names if name not in signal.Signals.__members__]
        if unknown:
            raise ValueError(f"preemption: signals holds {unknown[0]!r}; accepted: SIGTERM, SIGUSR1, SIGUSR2, SIGINT")
        if every_n_steps < 1:
            raise ValueError(f"preemption: every_n_steps must be at least 1, got {every_n_steps}")
        self.signals = [signal.Signals[name] for name in names]
        self.every_n_steps, self.requeue = every_n_steps, requeue
        self._received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._agreed = False
        self._training, self._interrupted = False, False
        self._process, self._tells = os.getpid(), False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._received, self._agreed = None, False
        self._training, self._interrupted = False, False
        self._process, self._tells = os.getpid(), trainer.is_global_zero
        self._writer(trainer)
        watch(trainer)
        main = threading.current_thread() is threading.main_thread()
        # a shell starts what is to run in the background with Ctrl-C ignored
        if signal.SIGINT in self.signals and main and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            # before the loader workers are forked
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._handle)

    def _writer(self, trainer: Trainer) -> ResumeCheckpoint:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, ResumeCheckpoint):
                return callback
        raise ValueError("preemption: the callback resume_checkpoint has to be there, too; it writes the checkpoint")

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a loader worker; it ends with the process that it works for
        if number == signal.SIGINT:
            if self._interrupted or not self._training:
                raise KeyboardInterrupt
            self._interrupted = True
            if self._tells:
                os.write(2, NOTICE)
        self._received = self._received or signal.Signals(number)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning has put its own handlers in place just before
        if threading.current_thread() is not threading.main_thread():
            return
        if trainer.received_sigterm and signal.SIGTERM in self.signals:
            self._received, trainer._signal_connector.received_sigterm = signal.SIGTERM, False
        others = [number for number in self.signals if number != signal.SIGINT]
        self._before |= {number: signal.signal(number, self._handle) for number in others}
        self._training = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore_handlers(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore_handlers(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore_handlers(trainer)  # where there was no training

    def _restore_handlers(self, trainer: Trainer) -> None:
        saved = trainer._signal_connector._original_handlers
        if signal.SIGINT in self._before and signal.SIGINT in saved:
            saved[signal.SIGINT] = self._before[signal.SIGINT]  # Lightning took ours for the one to go back to
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before, self._training = {}, False

    def _wanted(self, trainer: Trainer, count: int) -> bool:
        if trainer.world_size == 1:
            return self._received is not None
        if not self._agreed and count % self.every_n_steps == 0:
            self._agreed = trainer.strategy.reduce_boolean_decision(self._received is not None, all=False)
        return self._agreed

    def on_step_boundary(self, trainer: Trainer, pl_module: LightningModule) -> None:
        count = trainer.fit_loop.epoch_loop.batch_progress.total.completed
        stopped = self._wanted(trainer, count) and is_between_optimizer_steps(trainer)
        if stopped and not epoch_is_complete(trainer) and not _is_last_step(trainer):
            self._stop(trainer, "step")

    def on_epoch_boundary(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._wanted(trainer, 0) and epoch_is_complete(trainer) and not _is_last_step(trainer):
            self._stop(trainer, "epoch")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        if trainer.state.fn != "fit" or trainer.sanity_checking or not self._wanted(trainer, batch_idx):
            return
        if is_between_optimizer_steps(trainer) and not _is_last_step(trainer):
            self._stop(trainer, "validation")

    def _stop(self, trainer: Trainer, kind: str) -> None:
        writer = self._writer(trainer)
        path = writer.last_path
        if kind == "validation" or path is None or path.name != f"step={trainer.global_step}.ckpt":
            path = writer.save(trainer, kind)
        code = INTERRUPTED if self._received == signal.SIGINT else EXIT_CODE
        if trainer.is_global_zero:
            print(self._outcome(trainer, path), file=sys.stderr)
            if self.requeue and self._received == signal.SIGUSR1 and "SLURM_JOB_ID" in os.environ:
                _requeue()
        trainer.zoo_exit_code = code  # type: ignore[attr-defined]
        raise Preempted(path, trainer.global_step, code)

    def _outcome(self, trainer: Trainer, path: Path | None) -> str:
        step = trainer.global_step
        if self._received == signal.SIGINT and path:
            return f"stopped at step {step}; go on: zoo fit --resume {os.path.relpath(trainer.default_root_dir)}"
        name = self._received.name if self._received else "a signal on another rank"
        where = f"checkpoint: {path}" if path else "the checkpoint could not be written"
        return f"stopped by {name} after step {step}; {where}"


def _is_last_step(trainer: Trainer) -> bool:
    """Whether the training ends here anyway; a run that stopped now would not do what is left when it is resumed."""
    steps, epochs = trainer.max_steps, trainer.max_epochs
    by_steps = 0 <= steps <= trainer.global_step
    return by_steps or (epochs is not None and 0 <= epochs <= trainer.current_epoch)


def _requeue() -> None:
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"warning: the job {job} could not be requeued: {error}", file=sys.stderr)
