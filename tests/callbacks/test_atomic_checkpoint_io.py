"""Checkpoint files: whole or absent, plain, read safely."""

from __future__ import annotations

import errno
import os
import resource
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.atomic_checkpoint_io import AtomicCheckpointIO, check_plain
from callbacks.checkpoint_files import checkpoints_newest_first, is_readable, newest_checkpoint, recency
from tests.callbacks.toy import KILL, At, exit_code, final, fit, in_child, resume_callback
from zoo.errors import UsageError


def content(value: float = 1.0) -> dict[str, Any]:
    return {"state_dict": OrderedDict(w=torch.full((300, 300), value)), "n": 3, "none": None, "t": (1, [2.0])}


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint(content(), path)
    loaded = AtomicCheckpointIO().load_checkpoint(path)
    assert torch.equal(loaded["state_dict"]["w"], content()["state_dict"]["w"])
    assert (loaded["n"], loaded["none"], loaded["t"]) == (3, None, (1, [2.0]))


def test_full_disk_keeps_the_file_before(tmp_path: Path) -> None:
    path = tmp_path / "a.ckpt"

    def write() -> None:
        AtomicCheckpointIO().save_checkpoint(content(1.0), path)
        # a limit on the size of files fails a write as a full disk does
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            AtomicCheckpointIO().save_checkpoint(content(2.0), path)
        except OSError:
            os._exit(7)

    process = in_child(write)
    process.join(60)
    assert process.exitcode == 7
    assert float(AtomicCheckpointIO().load_checkpoint(path)["state_dict"]["w"][0, 0]) == 1.0
    assert [p.name for p in tmp_path.iterdir()] == ["a.ckpt"]


def test_killed_write_keeps_the_file_before_and_its_remains_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint(content(1.0), path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: os.kill(os.getpid(), KILL))
        assert exit_code(AtomicCheckpointIO().save_checkpoint, content(2.0), path) == -KILL
    assert len(list(tmp_path.iterdir())) == 2
    assert float(AtomicCheckpointIO().load_checkpoint(path)["state_dict"]["w"][0, 0]) == 1.0
    AtomicCheckpointIO().save_checkpoint(content(3.0), tmp_path / "b.ckpt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.ckpt", "b.ckpt"]


class Odd:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("was_run",))


def test_other_classes_are_refused_by_key(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"checkpoint\['callbacks'\]\['x'\]\[1\] is a pathlib"):
        AtomicCheckpointIO().save_checkpoint({"callbacks": {"x": [1, Path("a")]}}, tmp_path / "a.ckpt")
    with pytest.raises(TypeError, match=r"checkpoint\['a'\]: a key is a .*Odd"):
        check_plain({"a": {Odd(): 1}})
    assert list(tmp_path.iterdir()) == []


def test_what_is_accepted_is_what_torch_loads(tmp_path: Path) -> None:
    good = {"x": [True, 1, 1.0, 1j, "a", b"b", None, (1,), {2}, torch.float16, torch.Size([1]), torch.device("cpu")]}
    AtomicCheckpointIO().save_checkpoint(good, tmp_path / "a.ckpt")
    assert AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt") == good


def test_loading_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "evil": Odd()}, tmp_path / "evil.ckpt")
    for choice in (None, False, True):
        with pytest.raises(UsageError, match="could run code"):
            AtomicCheckpointIO().load_checkpoint(tmp_path / "evil.ckpt", weights_only=choice)
    assert not (tmp_path / "was_run").exists()
    assert not is_readable(tmp_path / "evil.ckpt")
    with pytest.raises(UsageError, match="only local files"):
        AtomicCheckpointIO().load_checkpoint("https://example.org/a.ckpt")
    with pytest.raises(UsageError, match="no such file"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "missing.ckpt")


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_checkpoints_are_passed_over(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (5, 10):
        AtomicCheckpointIO().save_checkpoint(content(step), folder / f"step={step}.ckpt")
    newest = folder / "step=10.ckpt"
    data = bytearray(newest.read_bytes())
    if damage == "flipped":
        data[len(data) // 2] ^= 255
    newest.write_bytes(data if damage == "flipped" else data[: len(data) // 2] if damage == "cut" else b"")
    assert [path.name for path in checkpoints_newest_first(tmp_path)] == ["step=10.ckpt", "step=5.ckpt"]
    assert newest_checkpoint(tmp_path) == folder / "step=5.ckpt"
    assert newest_checkpoint(tmp_path / "none") is None


def test_the_newest_checkpoint_of_a_copied_run_is_that_of_the_highest_step(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step, copied_at in ((100, 1), (20, 2), (3, 3)):
        AtomicCheckpointIO().save_checkpoint(content(step), folder / f"step={step}.ckpt")
        os.utime(folder / f"step={step}.ckpt", (copied_at, copied_at))
    assert [path.name for path in checkpoints_newest_first(tmp_path)] == [f"step={n}.ckpt" for n in (100, 20, 3)]
    assert newest_checkpoint(tmp_path) == folder / "step=100.ckpt"


def test_the_step_comes_before_the_time_and_a_name_without_one_last(tmp_path: Path) -> None:
    names = ["last.ckpt", "step=9.ckpt", "epoch=1-step=10.ckpt", "step=10.ckpt"]
    for name, time in zip(names, (9, 8, 2, 1), strict=True):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time, time))
    in_order = ["last.ckpt", "step=9.ckpt", "step=10.ckpt", "epoch=1-step=10.ckpt"]
    assert [path.name for path in sorted(tmp_path.iterdir(), key=recency)] == in_order


def test_a_failing_write_is_told_and_the_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = AtomicCheckpointIO.save_checkpoint, []

    def fails_second(self: Any, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, checkpoint, path, storage_options)

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", fails_second)
    with pytest.warns(RuntimeWarning, match=r"step=2\.ckpt could not be written.*No space.*step=1\.ckpt"):
        fit(tmp_path, [resume_callback(keep=3)])
    assert final(tmp_path)["counters"][0] == 15
    assert [path.name for path in checkpoints_newest_first(tmp_path)] == [f"step={n}.ckpt" for n in (15, 14, 13)]


def test_a_last_write_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", fails)
    with pytest.raises(OSError, match=r"step=15\.ckpt could not be written") as caught:
        fit(tmp_path, [resume_callback(every_n_steps=0, every_n_epochs=0)])
    assert caught.value.errno == errno.ENOSPC


def test_an_error_between_steps_saves_and_one_within_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.callbacks.toy import ToyBatches

    rare = {"every_n_steps": 0, "every_n_epochs": 0}
    with pytest.raises(RuntimeError, match="in a step"):
        fit(tmp_path, [resume_callback(**rare), At("on_before_optimizer_step", 3, RuntimeError("in a step"))])
    assert checkpoints_newest_first(tmp_path) == []
    plain = ToyBatches.batch

    def vanishing(self: Any, epoch: int, index: int) -> Any:
        if index == 3:
            raise FileNotFoundError("a data file vanished")
        return plain(self, epoch, index)

    monkeypatch.setattr(ToyBatches, "batch", vanishing)
    with pytest.raises(FileNotFoundError):
        fit(tmp_path, [resume_callback(**rare)])
    assert [path.name for path in checkpoints_newest_first(tmp_path)] == ["step=3.ckpt"]
