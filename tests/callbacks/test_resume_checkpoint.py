"""A killed and resumed run is the uninterrupted run, bit for bit."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from callbacks.checkpoint_files import checkpoints_newest_first, newest_checkpoint
from tests.callbacks.toy import KILL, At, Toy, ToyData, differences, exit_code, final, fit, resume_callback


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Returns a function that gives the outcome of an uninterrupted run with given options, each run once."""
    known: dict[str, dict[str, Any]] = {}

    def get(**options: Any) -> dict[str, Any]:
        key = repr(sorted(options.items()))
        if key not in known:
            folder = tmp_path_factory.mktemp("whole")
            assert exit_code(fit, folder, [], **options) == 0
            known[key] = final(folder)
        return known[key]

    return get


# (hook, number of the call at which the process is killed, checkpoint interval)
MOMENTS = [
    ("on_train_batch_start", 4, 1),
    ("on_before_optimizer_step", 3, 1),
    ("on_train_batch_end", 5, 1),  # last batch of the first epoch: its checkpoint comes after the validation
    ("on_train_batch_end", 8, 3),  # two steps are trained again
    ("on_validation_batch_end", 7, 1),  # in the middle of the second validation
    ("on_validation_end", 2, 1),
    ("on_train_epoch_end", 2, 1),
    ("on_train_epoch_start", 2, 1),  # the checkpoint at the end of an epoch
    ("on_train_epoch_start", 3, 0),
    ("on_train_batch_start", 12, 0),  # only checkpoints of epochs
]


@pytest.mark.parametrize(("hook", "call", "every"), MOMENTS)
def test_killed_and_resumed_is_bit_identical(
    hook: str, call: int, every: int, tmp_path: Path, uninterrupted: Any
) -> None:
    callbacks = [resume_callback(every_n_steps=every), At(hook, call, KILL)]
    assert exit_code(fit, tmp_path, callbacks) == -KILL
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert exit_code(fit, tmp_path, [resume_callback(every_n_steps=every)], found) == 0
    assert differences(uninterrupted(), final(tmp_path)) == []


@pytest.mark.parametrize(
    ("options", "hook", "call"),
    [
        ({"num_workers": 2}, "on_train_batch_end", 8),
        ({"val_check_interval": 2}, "on_train_batch_start", 8),  # right after a validation in mid-epoch
        ({"val_check_interval": 3, "check_val_every_n_epoch": None}, "on_train_batch_start", 10),
        ({"accumulate_grad_batches": 2}, "on_train_batch_end", 9),
        ({"limit_train_batches": 3}, "on_train_batch_start", 5),
        ({"max_epochs": -1, "max_steps": 12}, "on_train_batch_start", 9),
        ({"max_epochs": -1, "max_steps": 12}, "on_train_epoch_start", 3),
    ],
    ids=str,
)
def test_with_other_loops(options: dict[str, Any], hook: str, call: int, tmp_path: Path, uninterrupted: Any) -> None:
    assert exit_code(fit, tmp_path, [resume_callback(), At(hook, call, KILL)], **options) == -KILL
    found = newest_checkpoint(tmp_path)
    assert exit_code(fit, tmp_path, [resume_callback()], found, **options) == 0
    assert differences(uninterrupted(**options), final(tmp_path)) == []


def test_every_checkpoint_of_a_run_continues_it(tmp_path: Path, uninterrupted: Any) -> None:
    (tmp_path / "whole").mkdir()
    assert exit_code(fit, tmp_path / "whole", [resume_callback(keep=100)]) == 0
    files = sorted((tmp_path / "whole" / "checkpoints").iterdir())
    assert len(files) == 15
    for file in files:
        folder = tmp_path / file.stem
        folder.mkdir()
        shutil.copy(tmp_path / "whole" / "log.jsonl", folder / "log.jsonl")
        assert exit_code(fit, folder, [resume_callback(every_n_steps=0, every_n_epochs=0)], file) == 0
        if file.name != "step=15.ckpt":
            assert differences(uninterrupted(), final(folder)) == [], file.name


def steps_of(folder: Path) -> list[int]:
    """Steps of the checkpoints that are there, the newest first."""
    return [int(path.stem.partition("=")[2]) for path in checkpoints_newest_first(folder)]


def test_damaged_checkpoints_of_later_steps_do_not_outlive_a_resume(tmp_path: Path) -> None:
    fit(tmp_path, [resume_callback(every_n_steps=3, every_n_epochs=0, keep=5)])
    for step in (12, 15):
        path = tmp_path / "checkpoints" / f"step={step}.ckpt"
        path.write_bytes(path.read_bytes()[:100])
        os.utime(path, (2**32, 2**32))  # the order of times is that in which a copy was made
    found = newest_checkpoint(tmp_path)
    assert steps_of(tmp_path) == [15, 12, 9, 6, 3]
    assert found == tmp_path / "checkpoints" / "step=9.ckpt"
    with pytest.raises(RuntimeError, match="stopped"):
        fit(tmp_path, [resume_callback(keep=9), At("on_train_batch_start", 3, RuntimeError("stopped"))], found)
    assert steps_of(tmp_path) == [11, 10, 9, 6, 3]


def test_good_checkpoints_of_later_steps_are_the_first_to_be_pruned(tmp_path: Path) -> None:
    fit(tmp_path, [resume_callback(every_n_steps=3, every_n_epochs=0, keep=5)])
    earlier = tmp_path / "checkpoints" / "step=6.ckpt"
    for keep, left in ((4, [15, 7, 6, 3]), (3, [7, 6, 3])):  # a fit that was told to go back
        stop = At("on_train_batch_start", 2, RuntimeError("stopped"))
        with pytest.raises(RuntimeError, match="stopped"):
            fit(tmp_path, [resume_callback(keep=keep), stop], earlier)
        assert steps_of(tmp_path) == left


def test_lightning_leaves_the_loader_as_it_is(tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=str(tmp_path))
    predictions = trainer.predict(Toy(), ToyData())
    assert [len(part) for part in predictions or []] == [8] * 5
