"""The datamodule: facts before setup, batches as a function of their key, and refused arguments."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from datamodules.scratchpad.datamodule import TASKS, VisualScratchpadTasks, make_task


def small(**changes: Any) -> VisualScratchpadTasks:
    arguments = {"size": 4, "image_size": 16, "train_difficulty": [3, 5], "ood_difficulty": [6, 8]}
    arguments |= {"train_size": 64, "val_size": 10, "test_size": 20, "batch_size": 16, "eval_batch_size": 8}
    return VisualScratchpadTasks(**(arguments | changes))  # type: ignore[arg-type]


def test_facts_are_known_before_setup() -> None:
    data = small(stride=2)
    assert (data.image_size, data.cell_size, data.longest_solution) == (16, 4, 6)
    assert data.palette == [[1, 1, 1], [0, 0, 0], [0, 0, 1], [1, 0, 0]]
    assert small(task="cycles", size=None, image_size=64, train_difficulty=[6, 8], ood_difficulty=None).cell_size == 0


@pytest.mark.parametrize("task", TASKS)
def test_batches_have_the_documented_shapes(task: str) -> None:
    sizes = {"rect_maze": 4, "circ_maze": 2}
    ranges = {"cycles": ([6, 8], [10, 10]), "strings": ([8, 8], [10, 10])}.get(task, ([3, 5], [6, 8]))
    data = small(
        task=task,
        size=sizes.get(task),
        image_size=48,
        train_difficulty=ranges[0],
        ood_difficulty=ranges[1],
        num_workers=0,
    )
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["canvas"].shape == batch["arrival"].shape == (16, 48, 48)
    assert batch["canvas"].dtype == batch["arrival"].dtype == torch.uint8
    for key in ("label", "num_frames", "difficulty", "t"):
        assert batch[key].dtype == torch.int64
        assert batch[key].shape == (16,)
    assert ((batch["t"] >= 0) & (batch["t"] <= batch["num_frames"])).all()
    assert ((batch["difficulty"] >= ranges[0][0]) & (batch["difficulty"] <= ranges[0][1])).all()
    arrived = batch["arrival"].masked_fill(batch["arrival"] == 255, 0).flatten(1).max(dim=1).values
    assert (arrived <= batch["num_frames"]).all()


def test_a_batch_depends_on_epoch_and_index_alone() -> None:
    data = small()
    data.setup("fit")
    batches = data.batches("train")
    first, again, other = batches.batch(1, 2), batches.batch(1, 2), batches.batch(2, 2)
    assert all(torch.equal(first[key], again[key]) for key in first)  # type: ignore[literal-required]
    assert not torch.equal(first["canvas"], other["canvas"])
    fresh = small()
    fresh.setup("fit")
    assert torch.equal(fresh.batches("train").batch(1, 2)["canvas"], first["canvas"])
    seeded = small(data_seed=1)
    seeded.setup("fit")
    assert not torch.equal(seeded.batches("train").batch(1, 2)["canvas"], first["canvas"])


def test_an_epoch_shows_every_problem_once() -> None:
    data = small()
    data.setup("fit")
    batches = data.batches("train")
    seen = torch.cat([batches.batch(3, index)["canvas"] for index in range(len(batches))]).flatten(1)
    pool = data.task.sketch(data._pools["train"]).canvas.reshape(64, -1)
    assert sorted(map(bytes, seen.numpy())) == sorted(map(bytes, pool))


def test_ranks_hold_slices_of_the_global_batch() -> None:
    data = small()
    data.setup("fit")
    whole = data.batches("train").batch(0, 1)
    parts = []
    for rank in range(2):
        part = data.batches("train")
        part.rank, part.world_size = rank, 2
        parts.append(part.batch(0, 1))
    for key, value in whole.items():
        assert torch.equal(torch.cat([part[key] for part in parts]), value)  # type: ignore[literal-required]


def test_frames_are_drawn_uniformly_including_the_last() -> None:
    data = small(train_size=2000, batch_size=2000)
    data.setup("fit")
    batch = data.batches("train").batch(0, 0)
    position = batch["t"] / batch["num_frames"]
    expected = (1 / (batch["num_frames"] + 1)).sum()
    for value in (0.0, 1.0):
        count = (position == value).sum()
        assert abs(count - expected) < 4 * expected.sqrt()
    assert abs(batch["coin"].mean() - 0.5) < 0.03


def test_evaluation_has_a_loader_in_and_one_out_of_distribution() -> None:
    data = small()
    data.setup("test")
    inside, outside = data.test_dataloader()
    assert [len(batch["label"]) for batch in inside] == [8, 8, 4]
    difficulty = torch.cat([batch["difficulty"] for batch in outside])
    assert difficulty.min() >= 6
    assert len(difficulty) == 20
    alone = small(ood_difficulty=None)
    alone.setup("validate")
    assert len(alone.val_dataloader()) == 1


def test_splits_are_different_problems() -> None:
    data = small(train_size=200)
    data.setup("fit")
    data.setup("test")
    starts = [data._pools[name]["openings"][:10] for name in ("train", "val_id", "test_id")]
    assert not np.array_equal(starts[0], starts[1])
    assert not np.array_equal(starts[0], starts[2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ood_difficulty": [5, 8]}, r"overlaps train_difficulty=\[3, 5\]: expected it to start at 6"),
        ({"ood_difficulty": [6]}, "expected two numbers"),
        ({"task": "labyrinth"}, "expected one of rect_maze, circ_maze, cycles, strings"),
        ({"size": None}, "needs a size"),
        ({"task": "cycles", "image_size": 64, "train_difficulty": [6, 8]}, "at least 6"),
        ({"task": "strings", "size": 8, "train_difficulty": [8, 10], "ood_difficulty": None}, "of at least 3 pixels"),
        ({"task": "cycles", "size": None, "image_size": 64, "train_difficulty": [7, 8]}, "must be even"),
        ({"image_size": 18}, "multiple of 4"),
        ({"train_size": 15}, "even number"),
        ({"train_size": 8}, "smaller than batch_size"),
        ({"stride": 0}, "stride=0"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_the_size_of_strings_is_their_steps() -> None:
    fine, coarse = make_task("strings", 64, 10), make_task("strings", 64)
    problems = [task.draw(40, 8, 8, np.random.default_rng(0))["steps"] for task in (fine, coarse)]
    assert (abs(problems[0] - 2 * problems[1]) <= 2).all()
    with pytest.raises(ValueError, match="expected fewer than 254"):
        make_task("strings", 64, 12).check(8, 28)
