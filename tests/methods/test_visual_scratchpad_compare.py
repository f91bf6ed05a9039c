"""Figures over the runs of a campaign: the runs are found, tested elsewhere, and left as they are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from zoo.api import run
from zoo.methods.visual_scratchpad import compare
from zoo.methods.visual_scratchpad import figures as run_figures
from zoo.methods.visual_scratchpad.compare import (
    difficulty_figure,
    finished_runs,
    main,
    newest_checkpoint,
    samples_table,
    samples_until,
)


def test_the_newest_checkpoint_is_the_one_with_the_most_steps(tmp_path: Path) -> None:
    folder = tmp_path / "none" / "0"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").touch()
    for step in (90, 800, 110):
        (folder / "checkpoints" / f"step={step}.ckpt").touch()
    (tmp_path / "half" / "0").mkdir(parents=True)
    assert finished_runs(tmp_path) == {"none": {"0": folder}}
    assert newest_checkpoint(folder).name == "step=800.ckpt"


def test_a_folder_without_runs_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--runs", str(tmp_path)])
    assert "there is no run with a checkpoint" in capsys.readouterr().err


def test_the_median_and_the_range_of_the_seeds_are_drawn() -> None:
    levels = [{"5": [0.5, 10], "6": [right, 10]} for right in (0.4, 0.9, 0.6)]
    levels[0] |= {"7": [0.25, 40], "8": [0.0, 3]}  # lengths that only the problems of one seed have
    curve = [{"samples": 64.0, "id": 0.5, "ood": 0.4}, {"samples": 128.0, "id": 0.7, "ood": 0.6}]
    seeds = {
        str(i): {"task": "strings", "by_difficulty": one, "curve": curve, "trained_on": [5, 5]}
        for i, one in enumerate(levels)
    }
    left, right = difficulty_figure({"inductive": seeds}).axes
    assert left.lines[0].get_xydata().tolist() == [[5, 0.5], [6, 0.6], [7, 0.25]]
    assert len(right.lines) == 2 * 3 + 1, "two loaders of three seeds, and chance"
    other = {seed: one | {"task": "cycles"} for seed, one in seeds.items()}
    axes = difficulty_figure({"a": seeds, "b": other, "c": seeds}).axes
    assert [axis.get_ylabel() for axis in axes[::2]] == ["strings: accuracy", "cycles: accuracy"]
    assert [text.get_text() for text in axes[0].get_legend().get_texts()] == ["a", "c", "trained on"]


def test_samples_until_ninety_per_cent_are_read_off_the_curve() -> None:
    curve = [{"samples": 64.0, "id": 0.5, "ood": 0.4}, {"samples": 128.0, "id": 0.9, "ood": 0.8}]
    curve += [{"samples": 192.0, "id": 1.0, "ood": 0.89}, {"samples": 192.0, "id": 1.0, "ood": 0.95}]
    assert samples_until(curve, "id") == 128
    assert samples_until(curve[:3], "ood") is None
    one = {"task": "cycles", "curve": curve}
    table = samples_table({"inductive": {"0": one, "1": one | {"curve": curve[1:]}}})
    assert "| cycles | inductive | as in training | 128, 128 | 192 |" in table
    assert "| cycles | inductive | harder | 192, 192 | 192 |" in table, "the last point is the test"
    low = samples_table({"inductive": {"0": one | {"curve": curve[:1]}}})
    assert "| cycles | inductive | harder | - | 64 |" in low


def test_runs_are_tested_again_and_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    done = run("fit", config="visual_scratchpad/smoke", run_dir=tmp_path / "runs/inductive/0", wandb="disabled")
    before = {path: path.stat().st_mtime_ns for path in done.run_dir.rglob("*") if path.is_file()}
    main(["--runs", "runs", "--output", "out/figures", "--cache", "kept"])
    after = {path: path.stat().st_mtime_ns for path in done.run_dir.rglob("*") if path.is_file()}
    assert after == before
    measured = json.loads(Path("out/figures_compare.json").read_text())["inductive"]["0"]
    assert measured["curve"][-1]["samples"] == 40 * 32, "the curve ends with the test"
    assert measured["trained_on"] == [3, 5]
    assert set(measured["by_difficulty"]) <= {"3", "4", "5", "6", "7", "8"}
    assert sum(count for _, count in measured["by_difficulty"].values()) == 128, "both test sets"
    assert measured["curve"], "the learning curve comes from the checkpoint"
    assert Path("out/figures_difficulty.png").exists()
    assert Path("out/figures_rollouts.png").exists()
    first = Path("out/figures_compare.json").read_text()
    monkeypatch.setattr(compare, "measure", lambda _: pytest.fail("was measured before"))
    main(["--runs", "runs", "--output", "out/figures", "--cache", "kept"])
    assert Path("out/figures_compare.json").read_text() == first
    assert "| rect_maze | inductive | harder |" in Path("out/figures_samples.md").read_text()


def test_an_interval_has_some_width_at_the_ends_too() -> None:
    for right in (0, 7, 20):
        low, high = run_figures.wilson_interval(right / 20, 20)
        inside = wilson_by_definition(right, 20)
        np.testing.assert_allclose((low, high), inside, atol=1e-9)
        assert high - low > 0.1


def wilson_by_definition(right: int, n: int) -> tuple[float, float]:
    """Where a share p is 1.96 of its own standard errors from the one that was seen: the definition, solved."""
    grid = np.roots([n + 1.96**2, -(2 * right + 1.96**2), right**2 / n])
    return float(min(grid)), float(max(grid))


def test_difficulties_are_whole_numbers() -> None:
    axis = run_figures.difficulty_figure({5: (1.0, 100), 6: (0.5, 100)}).axes[0]
    assert all(float(tick).is_integer() for tick in axis.get_xticks())
