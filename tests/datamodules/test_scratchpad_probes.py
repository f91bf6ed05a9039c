"""No local cue tells the label, and the probes would notice one that does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from datamodules.scratchpad.catalogue import DEFAULTS, NAMES, task_of
from datamodules.scratchpad.loops import Cycles
from datamodules.scratchpad.probes import main, majority_accuracy, pixel_accuracy, probe
from datamodules.scratchpad.rect_maze import RectMaze
from datamodules.scratchpad.tasks import problem_pool


@pytest.mark.parametrize("name", NAMES)
def test_no_local_cue_answers_more_than_52_percent(name: str) -> None:
    """20,000 problems, half of them to fit on: the standard error is 0.5 %."""
    setting = DEFAULTS[name]
    task = task_of(name, setting["image_size"], setting["size"])
    low, high = setting["difficulty"]
    rows = probe(task, low, high, samples=20000, seed=1, pixels=False)
    local = {row["cue"]: row["accuracy"] for row in rows if row["reach"] == "local"}
    assert "ink" in local
    assert len(local) >= 6
    assert max(local.values()) <= 0.52, local
    assert max(row["accuracy"] for row in rows if row["reach"] == "global") > 0.6, "a cue that does tell it is noticed"


def test_cycles_at_fixed_places_do_not_leak_either() -> None:
    rows = probe(Cycles(48, 14), 12, 12, samples=20000, pixels=False)
    assert max(row["accuracy"] for row in rows if row["reach"] == "local") <= 0.52


def test_sums_over_all_lines_tell_the_answer_for_few_nodes() -> None:
    """Fewer than `n` lines say nothing, but six nodes have six lines: the probes must notice, and the page says so."""
    rows = probe(Cycles(24), 6, 6, samples=4000, pixels=False)
    assert {row["cue"]: row["accuracy"] for row in rows}["ink"] > 0.6


def test_both_answers_have_the_same_law_of_distances() -> None:
    problems = problem_pool(RectMaze(24, 6), 3, "train", 10000, 5, 10)
    no, yes = (problems["difficulty"][problems["label"] == label].astype(float) for label in (0, 1))
    error = np.hypot(no.std(), yes.std()) / np.sqrt(len(no))
    assert abs(no.mean() - yes.mean()) < 3 * error


def test_a_majority_is_counted_on_one_half_and_read_on_the_other() -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 4000)
    fit, read = np.arange(2000), np.arange(2000, 4000)
    assert majority_accuracy(label * 3 + 1, label, fit, read) == 1
    assert majority_accuracy(label + rng.normal(0, 0.1, 4000), label, fit, read) > 0.95
    assert abs(majority_accuracy(rng.normal(size=4000), label, fit, read) - 0.5) < 0.04
    one_each = np.arange(4000)  # fits the first half perfectly, says nothing about the second
    assert abs(majority_accuracy(one_each, label, fit, read) - 0.5) < 0.04


@pytest.mark.parametrize("kind", ["linear", "cnn"])
def test_predictors_from_pixels_find_a_label_that_is_drawn(kind: str) -> None:
    task = RectMaze(24, 6)
    problems = problem_pool(task, 0, "train", 3000, 5, 10)
    planted = {**problems, "label": (problems["end"] % 6 < 3).astype(np.uint8)}
    fit, read = np.arange(2400), np.arange(2400, 3000)
    assert pixel_accuracy(task, planted, kind, fit, read, epochs=3) > 0.9


def test_the_command_writes_its_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--task", "cycles", "--size", "9", "--difficulty", "6", "8", "--samples", "200", "--no-pixels"]
    main([*words, "--output", str(tmp_path / "leaks")])
    report = json.loads((tmp_path / "leaks.json").read_text())[0]
    assert report["size"] == 9
    assert report["samples"] == 200
    assert "| place of the start | local |" in (tmp_path / "leaks.md").read_text()
    for wrong, message in (
        (["--task", "all", "--size", "4"], "go with one --task"),
        (["--samples", "99"], "expected an even number of at least 100"),
        (["--task", "cycles", "--difficulty", "7", "8"], "must be even"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)
        assert message in capsys.readouterr().err
