"""`metrics.csv`: not written anew at each step, and never behind a checkpoint."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml

from callbacks import loggers
from callbacks.loggers import _STAGED, RunCSVLogger, look_for_launch_inputs_where_there_are_any, run_facts
from callbacks.resume_checkpoint import ResumeCheckpoint
from tests.callbacks.toy import fit


def steps(folder: Path) -> list[int]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of rows of each write."""
    counted: list[int] = []

    def write(path: Path, text: str) -> None:
        counted.append(text.count("\n") - 1)
        path.write_text(text)

    monkeypatch.setattr(loggers, "write_atomically", write)
    return counted


def log(logger: RunCSVLogger, first: int, last: int) -> None:
    for step in range(first, last + 1):
        logger.log_metrics({"loss": 1.0}, step)
        logger.save()  # as Lightning does after each logged step


def test_rows_are_written_together(tmp_path: Path, writes: list[int]) -> None:
    logger = RunCSVLogger(str(tmp_path), flush_every_n_rows=3, flush_every_seconds=1e9)
    log(logger, 0, 7)
    assert writes == [3, 6]
    logger.flush()
    logger.flush()
    assert writes == [3, 6, 8]
    log(logger, 8, 8)
    logger.after_save_checkpoint(None)
    assert writes == [3, 6, 8, 9]
    logger.rewind(4)
    logger.finalize("success")
    assert steps(tmp_path) == [0, 1, 2, 3]


def test_rows_are_written_after_a_while(tmp_path: Path, writes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(loggers.time, "monotonic", lambda: now[0])
    logger = RunCSVLogger(str(tmp_path), flush_every_seconds=5.0)
    log(logger, 0, 2)
    assert writes == [1], "the first row at once, so that there is a file to look at"
    now[0] += 5.0
    log(logger, 3, 4)
    assert writes == [1, 4]


def test_every_checkpoint_finds_its_rows_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    save = ResumeCheckpoint.save

    def look(self: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
        path = save(self, trainer, *args, **kwargs)
        seen.append((trainer.global_step, steps(tmp_path)[-1]))
        return path

    monkeypatch.setattr(ResumeCheckpoint, "save", look)
    logger = RunCSVLogger(str(tmp_path), flush_every_seconds=1e9)
    fit(tmp_path, [ResumeCheckpoint(every_n_steps=2)], logger=logger)
    assert len(seen) > 2
    assert all(row >= step - 1 for step, row in seen), seen


def test_launch_inputs_are_looked_for_only_where_there_can_be_any(monkeypatch: pytest.MonkeyPatch) -> None:
    class Run:
        looked = 0

        def _detect_and_apply_job_inputs(self) -> None:
            self.looked += 1

    class Other:
        pass

    for _ in range(2):
        look_for_launch_inputs_where_there_are_any(Run)
        look_for_launch_inputs_where_there_are_any(Other)
    assert not hasattr(Other, "_detect_and_apply_job_inputs")
    run = Run()
    monkeypatch.delitem(sys.modules, _STAGED, raising=False)
    run._detect_and_apply_job_inputs()
    assert run.looked == 0
    monkeypatch.setitem(sys.modules, _STAGED, types.ModuleType(_STAGED))
    run._detect_and_apply_job_inputs()
    assert run.looked == 1


def test_a_run_starts_without_wandb_launch(tmp_path: Path) -> None:
    code = (
        "import sys; from callbacks.loggers import RunWandbLogger;"
        "logger = RunWandbLogger(mode='offline'); logger.experiment.log({'a': 1}); logger.close(0);"
        "assert 'wandb.sdk.launch' not in sys.modules, 'it takes most of a second'"
    )
    env = {**os.environ, "ZOO_RUN_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, cwd=tmp_path)
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))


def test_a_wandb_run_can_be_found_by_data_and_seed(tmp_path: Path) -> None:
    config = {
        "seed_everything": 3,
        "model": {"class_path": "a.Method", "init_args": {"lr": 0.1}},
        "data": {"class_path": "some.module.Images", "init_args": {"labels_per_class": 10}},
        "trainer": {"max_steps": 5, "callbacks": [{"class_path": "b.Callback"}], "logger": []},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (tmp_path / "run.json").write_text('{"id": "x", "method": "suave", "config": "fashion_mnist"}', encoding="utf-8")
    assert run_facts(tmp_path) == {
        "seed": 3,
        "data": {"name": "Images", "labels_per_class": 10},
        "trainer": {"max_steps": 5},
        "method": "suave",
        "config": "fashion_mnist",
    }
    code = (
        "from callbacks.loggers import RunWandbLogger;"
        "logger = RunWandbLogger(mode='offline'); config = logger.experiment.config;"
        "assert config['data'] == {'name': 'Images', 'labels_per_class': 10}, config; assert config['seed'] == 3;"
        "logger.log_hyperparams({'lr': 0.1}); assert config['lr'] == 0.1 and config['seed'] == 3; logger.close(0)"
    )
    env = {**os.environ, "ZOO_RUN_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, cwd=tmp_path)


def test_a_directory_without_config_has_no_facts(tmp_path: Path) -> None:
    assert run_facts(tmp_path) == {}
