"""Problems as files: what is written can be read back and is what the datamodule trains on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from datamodules.scratchpad.catalogue import size_of, task_of
from datamodules.scratchpad.datamodule import VisualScratchpadTasks
from datamodules.scratchpad.export import export, main, picture
from datamodules.scratchpad.gallery import examples, gallery
from datamodules.scratchpad.rect_maze import RectMaze
from datamodules.scratchpad.tasks import PALETTE, problem_pool, rgb
from datamodules.scratchpad.traced import TracedCycles, TracedStrings, traced_frame

TASK = RectMaze(16, 4)
SMALL: dict[str, Any] = {"split": "train", "samples": 6, "difficulty": [3, 5], "seed": 3}


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "problems.jsonl").read_text().splitlines()]


def trained_on() -> Any:
    data = VisualScratchpadTasks(
        size=4, image_size=16, train_difficulty=[3, 5], train_size=6, val_size=2, test_size=2, batch_size=6, data_seed=3
    )
    data.setup("fit")
    return data.task.sketch(data._pools["train"])


def test_folders_hold_the_questions_and_steps_that_the_datamodule_trains_on(tmp_path: Path) -> None:
    export(TASK, tmp_path / "out", "folders", frames=True, **SMALL)
    sketch = trained_on()
    rows = lines(tmp_path / "out")
    assert [row["index"] for row in rows] == list(range(6))
    for row in rows:
        assert row["file_name"].split("/")[1] == ("no", "yes")[row["label"]]
        pixels = np.asarray(Image.open(tmp_path / "out" / row["file_name"]).convert("RGB"))
        np.testing.assert_array_equal(pixels, rgb(sketch.canvas[row["index"]]))
        steps = sorted((tmp_path / "out" / "train_frames" / f"{row['index']:07d}").iterdir())
        assert len(steps) == row["num_frames"] + 1
        end = np.asarray(Image.open(steps[-1]).convert("RGB"))
        blue = (end == np.asarray(PALETTE[2]) * 255).all(axis=-1)
        np.testing.assert_array_equal(blue, (sketch.arrival[row["index"]] != 255) | (sketch.canvas[row["index"]] == 2))
    assert json.loads((tmp_path / "out" / "export.json").read_text())["task"] == "rect_maze"


def test_image_folders_are_what_torchvision_reads(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    export(TASK, tmp_path / "out", "folders", **SMALL)
    folder = ImageFolder(tmp_path / "out" / "train")
    assert folder.classes == ["no", "yes"]
    assert sorted(folder.targets) == [0, 0, 0, 1, 1, 1]
    assert not (tmp_path / "out" / "train_frames").exists()


def test_a_gif_shows_every_step(tmp_path: Path) -> None:
    export(TASK, tmp_path / "out", "gif", scale=3, **SMALL)
    for row in lines(tmp_path / "out"):
        with Image.open(tmp_path / "out" / row["file_name"]) as film:
            assert film.n_frames == row["num_frames"] + 1  # type: ignore[attr-defined]
            assert film.size == (48, 48)
            first = np.asarray(film.convert("RGB"))[::3, ::3]
        np.testing.assert_array_equal(first, rgb(trained_on().canvas[row["index"]]))


def test_a_data_set_of_hugging_face_keeps_pixels_labels_and_frames(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    export(TASK, tmp_path / "out", "huggingface", frames=True, **SMALL)
    table = datasets.load_from_disk(str(tmp_path / "out" / "train"))
    assert table.features["label"].names == ["no", "yes"]
    sketch = trained_on()
    for row in table:
        np.testing.assert_array_equal(np.asarray(row["image"]), rgb(sketch.canvas[row["index"]]))
        assert len(row["frames"]) == row["num_frames"] + 1


def test_the_command_writes_and_refuses_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--task", "cycles", "--image-size", "32", "--difficulty", "6", "8", "--samples", "4"]
    main([*words, "--format", "gif", "--output", str(tmp_path / "films")])
    assert len(list((tmp_path / "films" / "train").glob("*.gif"))) == 4
    for changes, message in (
        (["--output", str(tmp_path / "films")], "there already and not empty"),
        (["--output", str(tmp_path / "a"), "--stride", "0"], "stride=0: expected at least 1"),
        (["--output", str(tmp_path / "a"), "--difficulty", "7", "8"], "must be even"),
        (["--output", str(tmp_path / "a"), "--size", "3"], "expected at least 6"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main([*words, *changes])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("kind", [TracedCycles, TracedStrings])
def test_traced_loops_are_written_as_their_network_sees_them(
    kind: type[TracedCycles] | type[TracedStrings], tmp_path: Path
) -> None:
    nodes = "6" if kind is TracedCycles else "8"
    words = ["--task", kind.name, "--image-size", "40", "--size", "5", "--difficulty", nodes, nodes, "--samples", "4"]
    main([*words, "--frames", "--output", str(tmp_path / "out")])
    assert json.loads((tmp_path / "out" / "export.json").read_text())["size"] == 5
    task = kind(40, 5)
    pool = problem_pool(task, 0, "train", 4, int(nodes), int(nodes))
    sketch = task.sketch(pool)
    for row in lines(tmp_path / "out"):
        steps = sorted((tmp_path / "out" / "train_frames" / f"{row['index']:07d}").iterdir())
        assert len(steps) == row["num_frames"] + 1
        for t, step in enumerate(steps):
            pixels = np.asarray(Image.open(step).convert("RGB"))
            np.testing.assert_array_equal(pixels, rgb(traced_frame(sketch, t))[row["index"]])


@pytest.mark.parametrize(("name", "size"), [("cycles", 14), ("strings", 6), ("rect_maze", 4), ("traced_strings", 5)])
def test_a_task_can_be_built_again_from_its_export(name: str, size: int) -> None:
    assert size_of(task_of(name, 48, size)) == size


def test_pictures_are_scaled_without_blending() -> None:
    indices = np.array([[0, 1], [2, 3]], dtype=np.uint8)
    pixels = np.asarray(picture(indices, 4).convert("RGB"))
    np.testing.assert_array_equal(pixels[::4, ::4], rgb(indices))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) == 4


def test_the_gallery_shows_both_answers_of_every_task() -> None:
    shown = examples(TASK, 3, 5, seed=0)
    assert [title for title, _ in shown if "question" in title] == ["question (no)", "question (yes)"]
    end_of_no, end_of_yes = shown[2][1], shown[5][1]
    red = np.asarray(PALETTE[3]) * 255
    assert (end_of_no == red).all(axis=-1).any(), "the end is not reached"
    assert not (end_of_yes == red).all(axis=-1).any(), "the end has turned blue"
    figure = gallery(seed=1)
    assert {axis.get_ylabel().split("\n")[0] for axis in figure.axes} - {""} == {
        "rect_maze", "circ_maze", "cycles", "strings", "traced_cycles", "traced_strings",
    }  # fmt: skip
