"""Faults, each injected for real into a child process, and what has to be left of the run afterwards.

Each function takes an empty folder and a random generator, and raises `AssertionError` if the run does not survive. It
returns a few words about what happened. The tests run each of them once, `tests.faults.reliability` many times.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from callbacks.checkpoint_files import checkpoints_newest_first
from tests.faults.toy import COUNT, Disturb, FilePoints, Fragile
from zoo.api import words
from zoo.children import Child
from zoo.runs import read_json
from zoo.testing.compare import differences, row_differences, told
from zoo.testing.subject import Run, probe, read_rows

EPOCHS, EVERY = 4, 7
STEPS = EPOCHS * COUNT
TIMEOUT = 120.0
_whole: dict[int, Run] = {}


def config(folder: Path, **data: Any) -> dict[str, Any]:
    """Options of the disturbed run; its data file is in `folder`."""
    return {
        "model": f"{Fragile.__module__}.Fragile",
        "data": f"{FilePoints.__module__}.FilePoints",
        "data.path": str(folder / "points.npy"),
        "trainer.max_epochs": EPOCHS,
        "trainer.accelerator": "cpu",
        "trainer.log_every_n_steps": 1,
        "trainer.enable_model_summary": False,
        "checkpoint.every_n_steps": EVERY,
        "checkpoint.keep": 3,
        **data,
    }


def start(
    folder: Path, overrides: Mapping[str, Any], env: Mapping[str, str] | None = None, command: str = "fit", **own: Any
) -> Child:
    """Start a command in a child process; what it prints goes to `<number>.log` in the folder."""
    log = folder / f"{len(list(folder.glob('*.log')))}.log"
    own = {"wandb": "disabled", **own}
    return Child([command, *words([], overrides, own)], folder, {"OMP_NUM_THREADS": "1", **(env or {})}, log)


def fit(folder: Path, callbacks: list[dict[str, Any]] | None = None, **options: Any) -> Child:
    """Start the run in `<folder>/run`, disturbed by callbacks."""
    own = {key: options.pop(key) for key in ("env", "wandb", "run_dir") if key in options}
    overrides = config(folder, **{key.replace("__", "."): value for key, value in options.items()})
    if callbacks:
        overrides["trainer.callbacks+"] = callbacks
    return start(folder, overrides, **{"run_dir": folder / "run", **own})


def resumed(folder: Path, **overrides: Any) -> Run:
    """Go on with the run and return it; it has to come to its end."""
    child = start(folder, {key.replace("__", "."): value for key, value in overrides.items()}, resume=folder / "run")
    code = child.wait(TIMEOUT)
    assert code == 0, f"--resume ended with {code}: {child.output()[-500:]}"
    return Run(folder / "run", read_rows(folder / "run"), output=child.output())


def undisturbed(folder: Path) -> Run:
    """The same run that nothing happens to; made once a process, beside the folder of the first test."""
    key = os.getpid()
    if key not in _whole or not _whole[key].folder.exists():
        place = folder / "undisturbed"
        place.mkdir()
        assert fit(place).wait(TIMEOUT) == 0
        _whole[key] = Run(place / "run", read_rows(place / "run"))
    return _whole[key]


def assert_same(run: Run, whole: Run) -> None:
    """Weights, optimiser, generators and metrics are those of the undisturbed run, bit for bit."""
    left, right = whole.final(), run.final()
    for content in (left, right):
        content["callbacks"] = {k: v for k, v in content["callbacks"].items() if "Resume" in k}
    found = differences(left, right, "checkpoint") + row_differences(whole.rows, run.rows)
    assert not found, told(found)


def assert_short(text: str, *wanted: str) -> None:
    """The end of what was printed is a short sentence with certain words and no traceback."""
    assert "Traceback" not in text, text[-1500:]
    missing = [word for word in wanted if word not in text]
    assert not missing, f"{missing} not in: {text[-800:]}"


def newest_step(folder: Path) -> int:
    """Step of the newest checkpoint, 0 if there is none."""
    found = checkpoints_newest_first(folder / "run")
    return int(found[0].stem.partition("=")[2]) if found else 0


def kill(folder: Path, draw: random.Random, **options: Any) -> str:
    """`kill -9` at a random moment, start-up and end included; nothing is lost but the steps since a checkpoint."""
    whole = undisturbed(folder)
    seconds = sum(stage["seconds"] for stage in read_json(whole.folder / "summary.json")["stages"].values())
    child = fit(folder, **options)
    moment = draw.uniform(0.0, 1.3 * seconds)
    time.sleep(moment)
    child.kill()
    logged = max((int(row["step"]) + 1 for row in read_rows(folder / "run") if row.get("train/loss")), default=0)
    assert logged <= newest_step(folder) + EVERY, "metrics run ahead of the checkpoints"
    step = newest_step(folder)
    if (folder / "run" / "config.yaml").exists():
        run = resumed(folder)
    else:
        assert fit(folder).wait(TIMEOUT) == 0
        run = Run(folder / "run", read_rows(folder / "run"))
    assert_same(run, whole)
    return f"killed after {moment:.2f} s, gone on from step {step}"


def kill_with_workers(folder: Path, draw: random.Random) -> str:
    """The same with two loader workers, resumed at once."""
    return kill(folder, draw, data__num_workers=2)


def terminate(folder: Path, draw: random.Random) -> str:
    """SIGTERM or SIGUSR1 at a random step: a checkpoint, exit code 143, and the run goes on."""
    step = draw.randrange(1, STEPS - 2)
    ready = folder / "ready"
    child = fit(folder, [probe(Disturb, step=step, what="wait", path=str(ready))])
    number = draw.choice([signal.SIGTERM, signal.SIGUSR1])
    assert child.wait_for(folder / "run" / "config.yaml")
    time.sleep(0.5)
    child.send(number)
    ready.touch()
    code = child.wait(TIMEOUT)
    assert code in (143, -number), f"exit code {code}: {child.output()[-500:]}"
    assert_same(resumed(folder), undisturbed(folder))
    return f"{signal.Signals(number).name}, exit code {code}"


def interrupt(folder: Path, draw: random.Random) -> str:
    """Ctrl-C at a random step, which loader workers get as well: a checkpoint, exit code 130, and the run goes on."""
    step = draw.randrange(1, STEPS - 2)
    ready = folder / "ready"
    disturb = probe(Disturb, step=step, what="wait", path=str(ready))
    child = fit(folder, [disturb], data__num_workers=2, checkpoint__every_n_steps=0, checkpoint__every_n_epochs=0)
    assert child.wait_for(folder / "run" / f"waiting-{step}")
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does
    ready.touch()
    code = child.wait(TIMEOUT)
    assert code == 130, f"exit code {code}: {child.output()[-500:]}"
    assert_short(child.output(), f"stopped at step {step}; go on: zoo fit --resume run\n")
    assert newest_step(folder) == step
    assert_same(resumed(folder, trainer__callbacks=None, checkpoint__every_n_steps=EVERY), undisturbed(folder))
    return f"at step {step}"


def full_disk(folder: Path, draw: random.Random) -> str:
    """No file can grow for a while: the run goes on, says so, and writes everything later."""
    first = draw.randrange(EVERY, STEPS // 2)
    last = draw.randrange(first + 2 * EVERY, STEPS - EVERY)
    child = fit(folder, [probe(Disturb, step=first, what="forbid"), probe(Disturb, step=last, what="allow")])
    code = child.wait(TIMEOUT)
    assert code == 0, f"exit code {code}: {child.output()[-800:]}"
    assert "could not be written" in child.output(), child.output()
    assert_same(Run(folder / "run", read_rows(folder / "run")), undisturbed(folder))
    return f"no space from step {first} to {last}"


def full_disk_to_the_end(folder: Path, draw: random.Random) -> str:
    """No file can grow from some step on: an error at the end, the earlier checkpoint whole, and the run goes on."""
    first = draw.randrange(2 * EVERY, STEPS - EVERY)
    child = fit(folder, [probe(Disturb, step=first, what="forbid")])
    assert child.wait(TIMEOUT) == 1
    assert 0 < newest_step(folder) <= first
    assert not list((folder / "run").rglob("*.tmp")), "remains of files"
    assert_same(resumed(folder, trainer__callbacks=None), undisturbed(folder))
    return f"no space from step {first} on"


def small_disk(folder: Path, draw: random.Random) -> str:
    """The run directory on a file system of 120 KB, which checkpoints and metrics fill; then it is enlarged."""
    disk = folder / "run"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", str(disk)], capture_output=True)
    if done.returncode != 0:
        raise NotImplementedError("mounting a file system is not permitted here")
    try:
        child = fit(folder, model__width=512)
        code = child.wait(TIMEOUT)
        assert code == 1, f"exit code {code}: {child.output()[-500:]}"
        assert "could not be written" in child.output(), child.output()[-500:]
        assert "Traceback" not in child.output(), child.output()[-2000:]
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        resumed(folder)
        assert newest_step(folder) == STEPS
    finally:
        subprocess.run(["umount", str(disk)], check=False)
    return "120 KB"


def read_only(folder: Path, draw: random.Random) -> str:
    """A directory that cannot be written: an answer of two lines, exit code 2."""
    place = Path("/proc/zoo-run")
    if os.geteuid() != 0:
        place = folder / "locked" / "run"
        place.parent.mkdir(mode=0o555)
    child = fit(folder, run_dir=place)
    assert child.wait(TIMEOUT) == 2, child.output()
    assert_short(child.output(), f"cannot write to run directory {place}")
    return str(place)


def wandb_unreachable(folder: Path, draw: random.Random) -> str:
    """`--wandb online` without a server: the training goes on, says so, and keeps the data for `wandb sync`."""
    env = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_MODE": "online"}
    started = time.monotonic()
    child = fit(folder, wandb="online", env=env)
    code = child.wait(TIMEOUT)
    assert code == 0, f"exit code {code}: {child.output()[-500:]}"
    assert_short(child.output(), "W&B is not reachable", "wandb sync")
    kept = list((folder / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert kept, "no data to be synchronised"
    assert_same(Run(folder / "run", read_rows(folder / "run")), undisturbed(folder))
    return f"{time.monotonic() - started:.0f} s in all"


def nan_loss(folder: Path, draw: random.Random) -> str:
    """A loss that is not a number stops the run with step and name; the last checkpoint is from before."""
    step = draw.randrange(EVERY + 1, STEPS)
    child = fit(folder, model__nan_at=step)
    assert child.wait(TIMEOUT) == 1
    assert_short(child.output(), f"step {step}", "loss")
    assert 0 < newest_step(folder) <= step
    assert_same(resumed(folder, model__nan_at=-1), undisturbed(folder))
    return f"at step {step}"


def data_vanish(folder: Path, draw: random.Random) -> str:
    """The data file is deleted during the run: a sentence that names it; put back, the run goes on."""
    step = draw.randrange(EVERY, STEPS - 2)
    path = folder / "points.npy"
    child = fit(folder, [probe(Disturb, step=step, what="remove", path=str(path))])
    code = child.wait(TIMEOUT)
    assert code == 1, f"exit code {code}: {child.output()[-500:]}"
    assert_short(child.output(), "points.npy", "--resume")
    assert_same(resumed(folder, trainer__callbacks=None), undisturbed(folder))
    return f"after step {step}"


def corrupt_checkpoint(folder: Path, draw: random.Random) -> str:
    """The newest checkpoint is cut off or has a changed byte: the one before is used, with a word about it."""
    child = fit(folder, [probe(Disturb, step=STEPS - 3, what="remove", path=str(folder / "points.npy"))])
    assert child.wait(TIMEOUT) == 1
    newest = checkpoints_newest_first(folder / "run")[0]
    content = bytearray(newest.read_bytes())
    place = draw.randrange(len(content))
    how = draw.choice(["cut off", "changed"])
    if how == "changed":
        # the archive's own padding is not part of the checkpoint
        place = content.find(b"PK\x01\x02") - draw.randrange(200, 2000)
        content[place] ^= 0xFF
    newest.write_bytes(content if how == "changed" else content[:place])
    run = resumed(folder, trainer__callbacks=None)
    assert_same(run, undisturbed(folder))
    assert how == "changed" or f"{newest.name} is damaged; trying the one before" in run.output, run.output
    return f"{how} at byte {place} of {len(content)}"


def out_of_memory(folder: Path, draw: random.Random) -> str:
    """No memory on the device: the message names the batch size and what to change."""
    step = draw.randrange(EVERY + 1, STEPS)
    child = fit(folder, model__memory_at=step, data__batch_size=8)
    assert child.wait(TIMEOUT) == 1
    assert_short(child.output(), "out of memory", "batch_size", "8", "accumulate_grad_batches")
    assert_same(resumed(folder, model__memory_at=-1), undisturbed(folder))
    return f"at step {step}"


def two_jobs(folder: Path, draw: random.Random) -> str:
    """A second job in the directory of a running one is refused, as `fit` and `--resume`; the first goes on."""
    ready = folder / "ready"
    first = fit(folder, [probe(Disturb, step=EVERY + 3, what="wait", path=str(ready))])
    assert first.wait_for(folder / "run" / "checkpoints" / f"step={EVERY}.ckpt")
    second = fit(folder)
    assert second.wait(TIMEOUT) == 2, second.output()
    assert_short(second.output(), "already holds a run")
    third = start(folder, {}, resume=folder / "run")
    assert third.wait(TIMEOUT) == 2, third.output()
    assert_short(third.output(), "another job is running")
    ready.touch()
    assert first.wait(TIMEOUT) == 0
    assert_same(Run(folder / "run", read_rows(folder / "run")), undisturbed(folder))
    return "both refused"


def worker_killed(folder: Path, draw: random.Random) -> str:
    """A loader worker is killed, as by the kernel when memory is short: a sentence, and the run goes on."""
    step = draw.randrange(EVERY, COUNT - 6)
    disturb = probe(Disturb, step=step, what="kill_worker")
    child = fit(folder, [disturb], data__num_workers=2)
    assert child.wait(TIMEOUT) == 1, child.output()[-500:]
    assert_short(child.output(), "worker")
    assert_same(resumed(folder, trainer__callbacks=None), undisturbed(folder))
    return f"after step {step}"


#: All faults by the name in the table; `repeat` says which are worth many moments.
FAULTS = {
    "kill -9": kill,
    "kill -9 with loader workers": kill_with_workers,
    "SIGTERM, SIGUSR1": terminate,
    "Ctrl-C": interrupt,
    "full disk for a while": full_disk,
    "full disk until the end": full_disk_to_the_end,
    "run directory on a tiny file system": small_disk,
    "run directory cannot be written": read_only,
    "W&B unreachable": wandb_unreachable,
    "loss not a number": nan_loss,
    "data file deleted": data_vanish,
    "damaged checkpoint": corrupt_checkpoint,
    "no memory on the device": out_of_memory,
    "two jobs in one directory": two_jobs,
    "loader worker killed": worker_killed,
}
