"""Going on with a run: options that win, options that last, launchers that start a job again, a disk that is full."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import zoo
from callbacks.figures import Figures
from tests.support import toy
from zoo import runs
from zoo.errors import RunError, UsageError

TOY = str(Path(__file__).parent / "support" / "toy.yaml")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fit(run_dir: str, **overrides: Any) -> zoo.RunResult:
    options = {key.replace("__", "."): value for key, value in overrides.items()}
    return zoo.run("fit", config=TOY, run_dir=run_dir, overrides=options)


def stored(run_dir: str) -> dict[str, Any]:
    return yaml.safe_load(runs.newest_config(Path(run_dir)).read_text())


def test_a_new_learning_rate_reaches_the_optimiser(capsys: pytest.CaptureFixture[str]) -> None:
    fit("r", model__lr=0.7)
    resumed = zoo.run("fit", resume="r", overrides={"trainer.max_epochs": 3, "model.lr": 0.1})
    assert "model.init_args.lr: 0.7 -> 0.1" in capsys.readouterr().err
    assert resumed.trainer.optimizers[0].param_groups[0]["lr"] == 0.1
    assert resumed.trainer.global_step == 15


def test_a_new_learning_rate_keeps_its_place_in_the_schedule() -> None:
    call: dict[str, Any] = {"config": "suave/smoke", "wandb": "disabled"}
    first = zoo.run("fit", run_dir="r", overrides={"trainer.max_steps": 4}, **call)
    halves = {"model.lr": first.model.hparams.lr / 2, "model.final_lr": first.model.hparams.final_lr / 2}
    resumed = zoo.run("fit", resume="r", overrides={"trainer.max_steps": 6, **halves}, wandb="disabled")
    whole = zoo.run("fit", run_dir="s", overrides={"trainer.max_steps": 6, **halves}, **call)
    for after, expected in zip(
        resumed.trainer.optimizers[0].param_groups, whole.trainer.optimizers[0].param_groups, strict=True
    ):
        assert after["initial_lr"] == expected["initial_lr"]
        assert after["lr"] == pytest.approx(expected["lr"])


def test_options_of_a_resume_hold_for_the_next_one(capsys: pytest.CaptureFixture[str]) -> None:
    fit("r")
    zoo.run("fit", resume="r", overrides={"trainer.max_epochs": 5, "trainer.max_steps": 13})
    for path in Path("r/checkpoints").glob("step=13*"):  # as if it had been killed before
        path.unlink()
    again = zoo.run("fit", resume="r")
    assert again.trainer.global_step == 13
    assert again.trainer.max_epochs == 5
    for _ in range(10):
        zoo.run("fit", resume="r")
    assert runs.newest_config(Path("r")).name == "config.resume-12.yaml"  # by number, not by alphabet
    capsys.readouterr()
    zoo.run("fit", resume="r", overrides={"trainer.max_epochs": 5})
    assert "differs" not in capsys.readouterr().err


def test_options_that_were_left_to_their_defaults_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    fit("r")
    zoo.run("fit", resume="r", overrides={"model.explode_at": 99})
    assert "model.init_args.explode_at: the default -> 99" in capsys.readouterr().err


def test_appended_callbacks_come_to_those_of_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    fit("r")
    item = {"class_path": "figures", "init_args": {"dpi": 50}}
    resumed = zoo.run("fit", resume="r", overrides={"trainer.callbacks+": item, "trainer.max_epochs": 3})
    assert "  trainer.callbacks: +Figures\n" in capsys.readouterr().err
    before = [
        entry["class_path"] for entry in yaml.safe_load(Path("r/config.yaml").read_text())["trainer"]["callbacks"]
    ]
    after = [entry["class_path"] for entry in stored("r")["trainer"]["callbacks"]]
    assert sorted(after) == sorted(before)
    assert [c.dpi for c in resumed.trainer.callbacks if isinstance(c, Figures)] == [50]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(runs, "shared_id", lambda: "slurm-17-0")
    return monkeypatch


def test_a_job_id_that_comes_again_does_not_overwrite(launched: pytest.MonkeyPatch) -> None:
    first = zoo.run("fit", config=TOY)
    config = (first.run_dir / "config.yaml").read_bytes()
    with pytest.raises(UsageError, match="slurm-17-0 already holds a run"):
        zoo.run("fit", config=TOY, overrides={"seed_everything": 2})
    assert (first.run_dir / "config.yaml").read_bytes() == config


@pytest.mark.parametrize("run_dir", [None, "r"])
@pytest.mark.parametrize("variable", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
def test_a_requeued_job_goes_on(
    variable: str, run_dir: str | None, launched: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    launched.setenv(variable, "1")
    first = zoo.run("fit", config=TOY, run_dir=run_dir)  # nothing there yet, whatever the count says
    assert "started before" not in capsys.readouterr().err
    for path in (first.run_dir / "checkpoints").glob("step=10*"):
        path.unlink()
    again = zoo.run("fit", config=TOY, run_dir=run_dir)
    assert again.run_dir == first.run_dir
    assert again.trainer.global_step == 10
    said = capsys.readouterr().err
    assert "this job was started before; going on with the run in" in said
    assert "starting from:" in said


def test_a_requeued_job_without_a_model_is_told_so(launched: pytest.MonkeyPatch) -> None:
    launched.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(UsageError, match="no model is given"):
        zoo.run("fit", overrides={"model.lr": 0.1})


@contextmanager
def full_disk() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_at_the_start_leaves_no_lock() -> None:
    with pytest.raises(UsageError, match="cannot write to run directory"), full_disk():
        fit("r")
    assert not runs._HELD
    assert fit("r").exit_code == 0


@pytest.mark.parametrize("kind", [EOFError, ConnectionResetError])
def test_a_loader_process_that_dies_while_its_batch_is_fetched(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def rebuild_storage_fd(*_: object) -> None:
        raise kind

    monkeypatch.setattr(toy.Toy, "training_step", rebuild_storage_fd)
    with pytest.raises(RunError, match="a loader process has died: a worker was cut off"):
        fit("r")


def test_a_class_in_a_broken_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_mod.py").write_text("def M(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match="broken_mod"):
        zoo.run("fit", config=TOY, overrides={"model": "broken_mod.M"})


def test_the_commit_is_that_of_the_zoo_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed into an environment below somebody's own checkout, it would name theirs."""
    package = tmp_path / "theirs" / ".venv" / "zoo"
    package.mkdir(parents=True)
    for words in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-mx"],
    ):
        subprocess.run(["git", "-C", str(tmp_path / "theirs"), *words], check=True)
    monkeypatch.setattr(runs, "__file__", str(package / "runs.py"))
    assert runs.commit() == ""


def test_info_shows_claims_that_are_still_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from zoo.commands import info

    claim = {"id": "open-one", "value": None, "mean": None, "margin": 0.1, "holds": None}
    (tmp_path / "results").mkdir()
    content = json.dumps({"scale": "cpu", "seeds": [0], "claims": [claim]})
    (tmp_path / "results" / "toy.cpu.json").write_text(content)
    monkeypatch.setattr(info, "__file__", str(tmp_path / "a" / "b" / "info.py"))
    info.print_claims("toy")
    assert capsys.readouterr().out.split()[-5:] == ["open-one", "–", "(margin", "+0.1000)", "open"]


def test_a_rate_that_was_lowered_on_a_plateau_stays_lowered() -> None:
    from lightning.pytorch.utilities.types import LRSchedulerConfig
    from torch import nn, optim

    from zoo.new_options import NewOptions

    optimizer = optim.SGD([nn.Parameter(nn.Linear(1, 1).weight)], lr=0.5, weight_decay=0.25)
    scheduler = optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    trainer: Any = SimpleNamespace(
        optimizers=[optimizer], lr_scheduler_configs=[LRSchedulerConfig(scheduler, reduce_on_plateau=True)]
    )
    options, module = NewOptions(), toy.Toy(num_classes=2)
    options.on_fit_start(trainer, module)
    optimizer.param_groups[0].update(lr=0.05, weight_decay=0.125)  # what a checkpoint restores
    options.on_train_start(trainer, module)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.05, 0.25)
