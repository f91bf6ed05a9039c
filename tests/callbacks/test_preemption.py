"""SIGTERM and Ctrl-C: the step ends, a checkpoint is written, exit code 143 or 130; the resumed run is the same."""

from __future__ import annotations

import errno
import os
import signal
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy

from callbacks.atomic_checkpoint_io import AtomicCheckpointIO
from callbacks.preemption import EXIT_CODE, Preemption
from callbacks.resume_checkpoint import checkpoints_newest_first, newest_checkpoint
from tests.callbacks.toy import KILL, At, differences, exit_code, final, fit, in_child, resume_callback


@pytest.mark.parametrize(
    ("hook", "call", "number", "expected"),
    [
        ("on_before_optimizer_step", 3, signal.SIGTERM, "step=3.ckpt"),
        ("on_train_batch_start", 10, signal.SIGUSR1, "step=10.ckpt"),  # last of an epoch: after its validation
        ("on_validation_batch_start", 8, signal.SIGTERM, "step=10.ckpt"),  # in the middle of a validation
        ("on_train_epoch_end", 1, signal.SIGTERM, "step=5.ckpt"),
        ("on_before_optimizer_step", 3, signal.SIGINT, "step=3.ckpt"),
        ("on_train_start", 1, signal.SIGINT, "step=1.ckpt"),
        ("on_after_backward", 8, signal.SIGINT, "step=8.ckpt"),
        ("on_validation_batch_start", 8, signal.SIGINT, "step=10.ckpt"),
        ("on_validation_epoch_end", 2, signal.SIGINT, "step=10.ckpt"),
    ],
)
def test_signalled_and_resumed_is_bit_identical(
    hook: str, call: int, number: int, expected: str, tmp_path: Path
) -> None:
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    rare = {"every_n_steps": 0, "every_n_epochs": 0}
    assert exit_code(fit, tmp_path / "whole", []) == 0
    folder = tmp_path / "stopped"
    callbacks = [resume_callback(**rare), Preemption(), At(hook, call, number)]
    assert exit_code(fit, folder, callbacks) == (130 if number == signal.SIGINT else 143)
    found = newest_checkpoint(folder)
    assert found is not None
    assert found.name == expected
    assert exit_code(fit, folder, [resume_callback(**rare), Preemption()], found) == 0
    assert differences(final(tmp_path / "whole"), final(folder)) == []


def test_a_training_that_ends_anyway_is_finished(tmp_path: Path) -> None:
    callbacks = [resume_callback(), Preemption(), At("on_validation_batch_start", 13, signal.SIGTERM)]
    (tmp_path / "whole").mkdir()
    assert exit_code(fit, tmp_path, callbacks) == EXIT_CODE  # the third epoch's validation is still needed
    stop = [resume_callback(), Preemption(), At("on_train_epoch_end", 1, signal.SIGTERM)]
    assert exit_code(fit, tmp_path, stop, newest_checkpoint(tmp_path)) == 0
    assert exit_code(fit, tmp_path / "whole", []) == 0
    assert differences(final(tmp_path / "whole"), final(tmp_path)) == []


def test_stopped_again_right_after_the_validation_that_was_run_again(tmp_path: Path) -> None:
    """The checkpoint of the first stop would run that validation, and log it, once more."""
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    rare = {"every_n_steps": 0, "every_n_epochs": 0}
    assert exit_code(fit, tmp_path / "whole", []) == 0
    folder = tmp_path / "stopped"
    for hook, call in (("on_validation_batch_start", 8), ("on_train_epoch_end", 1)):
        callbacks = [Preemption(), resume_callback(**rare), At(hook, call, signal.SIGTERM)]
        assert exit_code(fit, folder, callbacks, newest_checkpoint(folder)) == EXIT_CODE
        assert [path.name for path in checkpoints_newest_first(folder)] == ["step=10.ckpt"]
    assert exit_code(fit, folder, [resume_callback(**rare)], newest_checkpoint(folder)) == 0
    assert differences(final(tmp_path / "whole"), final(folder)) == []


class Twice(At):
    """Sends the signal again while the checkpoint is being written."""

    def on_save_checkpoint(self, *args: Any) -> None:
        assert not isinstance(self.action, Exception)
        os.kill(os.getpid(), self.action)


def test_a_second_ctrl_c_while_saving_ends_at_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rare = resume_callback(every_n_steps=3, every_n_epochs=0)

    def interrupted() -> None:
        fit(tmp_path, [rare, Preemption(), Twice("on_train_batch_start", 2, signal.SIGINT)])

    assert exit_code(interrupted) == 1  # Lightning's, which the command line makes 130
    assert checkpoints_newest_first(tmp_path) == []
    assert not list(tmp_path.rglob("*.tmp"))
    err = capfd.readouterr().err
    assert err.count("Ctrl-C: stopping after this step") == 1
    assert "stopped at step" not in err


@pytest.mark.parametrize("hook", ["setup", "on_fit_start"])
def test_ctrl_c_before_the_training_ends_at_once(hook: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stop = At(hook, 1, signal.SIGINT)
    assert exit_code(fit, tmp_path, [resume_callback(), Preemption(), stop]) == 1
    assert checkpoints_newest_first(tmp_path) == []
    assert "Ctrl-C" not in capfd.readouterr().err


def test_loader_workers_outlive_ctrl_c(tmp_path: Path) -> None:
    """A terminal sends it to them, too, before the main process has what the step needs."""

    class ToWorkers(At):
        def _call(self, trainer: Any, *args: Any, **kwargs: Any) -> None:
            self.count -= 1
            if self.count == 0:
                for worker in trainer.train_dataloader._loader._iterator._workers:
                    os.kill(worker.pid, signal.SIGINT)
                    worker.join(0.3)
                    assert worker.is_alive()

    workers = ToWorkers("on_train_batch_start", 2, signal.SIGINT)
    assert exit_code(fit, tmp_path, [resume_callback(), Preemption(), workers], num_workers=2) == 0


def handlers() -> list[Any]:
    """The present handlers of the signals that a training takes."""
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]


def test_handlers_are_put_back(tmp_path: Path) -> None:
    before = handlers()
    fit(tmp_path, [resume_callback(), Preemption()], max_epochs=1)
    assert handlers() == before
    fit(tmp_path, [resume_callback(), Preemption()], max_epochs=0)
    assert handlers() == before
    for hook in ("on_fit_start", "on_train_start", "on_train_batch_start"):
        with pytest.raises(RuntimeError, match="broken"):
            fit(tmp_path, [resume_callback(), Preemption(), At(hook, 1, RuntimeError("broken"))])
        assert handlers() == before
    with pytest.raises(SystemExit):
        fit(tmp_path, [resume_callback(), Preemption(), At("on_train_batch_start", 1, signal.SIGINT)])
    assert handlers() == before


class Unsaveable(Callback):
    """Makes every checkpoint fail."""

    def on_save_checkpoint(self, *args: Any) -> None:
        raise ValueError("cannot be saved")


class Broken(Callback):
    """Fails between two steps, where a checkpoint could be written."""

    def on_step_boundary(self, *args: Any) -> None:
        raise RuntimeError("broken")


def test_handlers_are_put_back_where_no_checkpoint_can_be_made(tmp_path: Path) -> None:
    before = handlers()
    with pytest.raises(ValueError, match="cannot be saved"):
        fit(tmp_path, [resume_callback(), Preemption(), Unsaveable()])
    assert handlers() == before
    rare = resume_callback(every_n_steps=0, every_n_epochs=0)
    warned = pytest.warns(RuntimeWarning, match="no checkpoint at the end of the run: cannot be saved")
    with warned, pytest.raises(RuntimeError, match="broken"):
        fit(tmp_path, [rare, Preemption(), Unsaveable(), Broken()])
    assert handlers() == before


def test_ctrl_c_that_was_ignored_stays_ignored(tmp_path: Path) -> None:
    def in_the_background() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        fit(tmp_path, [resume_callback(), Preemption(), At("on_train_batch_start", 2, signal.SIGINT)])
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN

    assert exit_code(in_the_background) == 0


def test_bad_options(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="signals holds 'SIGFOO'"):
        Preemption(signals=["SIGFOO"])
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        Preemption(every_n_steps=0)
    with pytest.raises(ValueError, match="resume_checkpoint has to be there"):
        fit(tmp_path, [Preemption()])


def two_ranks(
    folder: Path, make_callbacks: Any, checkpoint: Path | None = None, strategy: Any = DDPStrategy, **more: Any
) -> list[int]:
    """Fit in two gloo processes and return their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank in range(2):
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0",
                       "LOCAL_RANK": str(rank)}  # fmt: skip
        options: dict[str, Any] = {
            "devices": 2,
            "strategy": strategy(),
            "environment": environment,
        }
        processes.append(in_child(fit, folder, make_callbacks(rank), checkpoint, **options, **more))
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def test_two_ranks_killed_and_resumed(tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    assert two_ranks(tmp_path / "whole", lambda rank: []) == [0, 0]
    folder = tmp_path / "killed"
    codes = two_ranks(folder, lambda rank: [resume_callback(), At("on_train_batch_start", 8, KILL)])
    assert codes == [-KILL, -KILL]
    assert two_ranks(folder, lambda rank: [resume_callback()], newest_checkpoint(folder)) == [0, 0]
    assert differences(final(tmp_path / "whole"), final(folder)) == []


def test_two_ranks_stop_at_the_same_step_when_one_is_signalled(tmp_path: Path) -> None:
    def callbacks(rank: int) -> list[Any]:
        stop = [At("on_train_batch_start", 7, signal.SIGTERM)] if rank == 1 else []
        return [resume_callback(every_n_steps=0, every_n_epochs=0), Preemption(every_n_steps=2), *stop]

    assert two_ranks(tmp_path, callbacks) == [EXIT_CODE, EXIT_CODE]
    assert [path.name for path in checkpoints_newest_first(tmp_path)] == ["step=8.ckpt"]


class FullDisk(Callback):
    """Lets the first rank fail to write one checkpoint; `told-<rank>` says what each rank was told."""

    def __init__(self, name: str, times: int) -> None:
        super().__init__()
        self.name, self.times = name, times

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        told, real = Path(trainer.default_root_dir, f"told-{trainer.global_rank}"), AtomicCheckpointIO.save_checkpoint

        def save(writer: Any, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
            if Path(path).name == self.name and self.times > 0:
                self.times -= 1
                raise OSError(errno.ENOSPC, "No space left on device")
            real(writer, checkpoint, path, storage_options)

        def show(message: Warning | str, category: type[Warning], *args: Any) -> None:
            if issubclass(category, RuntimeWarning):
                told.write_text(str(message))

        AtomicCheckpointIO.save_checkpoint = save  # type: ignore[method-assign]
        warnings.simplefilter("always")
        warnings.showwarning = show

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        number = getattr(exception, "errno", None)
        Path(trainer.default_root_dir, f"told-{trainer.global_rank}").write_text(f"{number}: {exception}")


def test_a_write_that_fails_on_one_of_two_ranks_fails_on_both(tmp_path: Path) -> None:
    """That of the last epoch fails, the one at the end of the training, which is due to that, does not."""
    assert two_ranks(tmp_path, lambda rank: [resume_callback(every_n_steps=0), FullDisk("step=15.ckpt", 1)]) == [0, 0]
    assert [path.name for path in checkpoints_newest_first(tmp_path)] == ["step=15.ckpt", "step=10.ckpt"]
    for rank, cause in ((0, "No space left on device"), (1, "another process failed to write it")):
        told = (tmp_path / f"told-{rank}").read_text()
        assert "step=15.ckpt could not be written" in told
        assert cause in told
        assert told.endswith("step=10.ckpt; the training goes on and will try again")


def test_a_last_write_that_fails_on_one_of_two_ranks_is_an_error_on_both(tmp_path: Path) -> None:
    assert two_ranks(tmp_path, lambda rank: [resume_callback(every_n_steps=0), FullDisk("step=15.ckpt", 2)]) == [1, 1]
    for rank, number in ((0, errno.ENOSPC), (1, errno.EIO)):
        told = (tmp_path / f"told-{rank}").read_text()
        assert f"{number}: " in told
        assert "step=15.ckpt could not be written" in told
        assert told.endswith("step=10.ckpt")


def test_a_slurm_job_is_requeued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = tmp_path / "called"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {called}\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    from callbacks.preemption import _requeue

    monkeypatch.setenv("SLURM_JOB_ID", "17")
    _requeue()
    assert called.read_text() == "requeue 17\n"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "16")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    _requeue()
    assert called.read_text() == "requeue 16_3\n"
