"""Lines about a run in a log file, and what stays above the bars at a terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from callbacks import progress
from tests.support.toy import Toy
from zoo.main import main

ROOT = Path(__file__).parents[2]
TOY = str(ROOT / "tests" / "support" / "toy.yaml")


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that goes on by ten seconds at each batch."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def slow(plain: Any) -> Any:
        def step(self: Any, batch: Any, batch_idx: int) -> Any:
            now[0] += 10.0
            return plain(self, batch, batch_idx)

        return step

    for name in ("training_step", "validation_step", "test_step", "predict_step"):
        monkeypatch.setattr(Toy, name, slow(getattr(Toy, name)))
    return now


def every(seconds: float) -> list[str]:
    return ["--trainer.callbacks+", f"{{class_path: progress, init_args: {{seconds: {seconds}}}}}"]


def test_lines_hold_what_was_logged_since_the_line_before(
    seconds: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", TOY, *every(25)]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.startswith("step ")]
    assert [re.sub(r" [\d.]+(?= |$)", "", line.split(" s  ")[1]) for line in lines] == [
        "train/loss", "train/loss  val/acc", "train/loss", "train/loss  val/acc",
    ]  # fmt: skip
    assert [line.split("  ")[:2] for line in lines] == [
        ["step 3/10", "30 s"], ["step 5/10", "70 s"], ["step 8/10", "100 s"], ["step 10/10", "140 s"],
    ]  # fmt: skip


def test_a_value_that_was_not_logged_again_is_not_repeated(
    seconds: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Toy.training_step

    def step(self: Toy, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 0:
            self.log("train/once", 16960.0)
        return plain(self, batch, batch_idx)

    monkeypatch.setattr(Toy, "training_step", step)
    assert main(["fit", "--config", TOY, *every(5)]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert [("train/once 16960" in line) for line in lines] == [True, *[False] * (len(lines) - 1)]


@pytest.mark.parametrize(
    ("command", "doing"), [("validate", "validating"), ("test", "testing"), ("predict", "predicting")]
)
def test_long_evaluations_count_their_batches(
    command: str, doing: str, seconds: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--config", TOY, *every(20)]) == 0
    out, err = capsys.readouterr()
    assert [line for line in err.splitlines() if "batches" in line] == [f"{doing} 2/2 batches  20 s"]
    assert "batches" not in out
    assert main([command, "--config", TOY, *every(21)]) == 0
    assert "batches" not in capsys.readouterr().err


def test_a_long_validation_of_a_training_counts_too(seconds: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", TOY, "--trainer.max_steps", "5", *every(65)]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert "validating 2/2 batches  20 s" in lines
    assert next(line for line in lines if line.startswith("step ")).startswith("step 5/5  70 s")


def at_a_terminal(*words: str) -> str:
    """What a command writes to a terminal of 100 columns."""
    first, second = pty.openpty()
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
           "COLUMNS": "100", "TERM": "xterm", "WANDB_MODE": "disabled"}  # fmt: skip
    child = subprocess.Popen([sys.executable, "-m", "zoo", *words], stdout=second, stderr=second, stdin=second, env=env)
    os.close(second)
    seen = b""
    while True:
        try:
            part = os.read(first, 65536)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        seen += part
    os.close(first)
    assert child.wait(timeout=60) == 0, seen.decode()
    return seen.decode()


def test_validations_stay_above_the_bar_at_a_terminal() -> None:
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", at_a_terminal("fit", "--config", TOY)))
    kept = [line.strip() for line in lines if line.startswith("step ")]
    assert [re.match(r"step \d+/10", line)[0] for line in kept] == ["step 5/10", "step 10/10"]  # type: ignore[index]
    assert all("val/acc" in line for line in kept)


def test_the_table_of_a_test_comes_after_the_last_bar() -> None:
    seen = at_a_terminal("test", "--config", TOY)
    assert seen.rindex("Testing") < seen.index("test/acc")
