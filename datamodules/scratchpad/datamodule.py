"""Batches of connectivity questions with the sketches of their solution."""

from __future__ import annotations

from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from datamodules.loading import Batches, ResumableLoader, ZooDataModule, epoch_permutation, keyed_generator
from datamodules.scratchpad.circ_maze import CircMaze
from datamodules.scratchpad.loops import Cycles
from datamodules.scratchpad.rect_maze import RectMaze
from datamodules.scratchpad.strings import Strings
from datamodules.scratchpad.tasks import PALETTE, Problems, Task, num_frames, problem_pool, rows_of

#: Names that `make_task` takes.
TASKS = ("rect_maze", "circ_maze", "cycles", "strings")


class ScratchpadBatch(TypedDict):
    """Questions, answers, and what is needed to show any frame of the solution.

    Frame `t` of a sample is blue (palette index 2) where `arrival <= t` and has the colour of `canvas` elsewhere;
    frame 0 is the question and frames from `num_frames` on show the whole solution.
    """

    canvas: Tensor
    """Palette indices of the question, uint8 `[B, H, W]`."""
    arrival: Tensor
    """Frame in which a pixel turns blue, uint8 `[B, H, W]`; 255 where it does not."""
    label: Tensor
    """1 for yes, 0 for no, int64 `[B]`."""
    num_frames: Tensor
    """Number `T` of the last frame, int64 `[B]`."""
    difficulty: Tensor
    """Length of the path (mazes) or number of nodes (cycles, strings), int64 `[B]`."""
    t: Tensor
    """A frame drawn uniformly from `0 .. T`, int64 `[B]`."""
    coin: Tensor
    """A number drawn uniformly from `[0, 1)`, float32 `[B]`."""


def make_task(task: str, image_size: int, size: int | None = None) -> Task:
    """Build a generator by name.

    Args:
        task: One of `TASKS`.
        image_size: Height and width in pixels.
        size: Cells along a side (`rect_maze`), number of rings (`circ_maze`), fixed places on the circle (`cycles`;
            None for as many places as nodes, turned at random), or solver steps for a string as long as the picture
            is wide (`strings`; None for 5).

    Raises:
        ValueError: If the name is unknown or the sizes do not fit.
    """
    if task in ("rect_maze", "circ_maze"):
        if size is None:
            raise ValueError(
                f"task {task!r} needs a size: cells along a side (rect_maze) or number of rings (circ_maze)"
            )
        return RectMaze(image_size, size) if task == "rect_maze" else CircMaze(image_size, size)
    if task not in TASKS:
        raise ValueError(f"task={task!r}: expected one of {', '.join(TASKS)}")
    if task == "cycles":
        return Cycles(image_size, size)
    return Strings(image_size) if size is None else Strings(image_size, size)


class ScratchpadBatches(Batches):
    """Batches of a pool of problems, drawn to pixels when they are asked for.

    Args:
        task: Generator that made the problems.
        problems: The pool.
        stride: Solver steps from one frame to the next.
        batch_size: Global batch size.
        seed: Seed of the order, of `t` and of `coin`.
        shuffle: Whether each epoch has an order of its own and drops the incomplete batch at the end.
    """

    def __init__(
        self, task: Task, problems: Problems, stride: int, batch_size: int, seed: int, shuffle: bool = False
    ) -> None:
        self.task, self.problems, self.stride = task, problems, stride
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        self.size = len(problems["label"])

    def __len__(self) -> int:
        return self.size // self.batch_size if self.shuffle else -(-self.size // self.batch_size)

    def batch(self, epoch: int, index: int) -> ScratchpadBatch:
        """Rows `index * batch_size ...` of the epoch's order."""
        start, stop = index * self.batch_size, min((index + 1) * self.batch_size, self.size)
        chosen = (
            epoch_permutation(self.size, self.seed, epoch)[start:stop] if self.shuffle else torch.arange(start, stop)
        )
        generator = keyed_generator(self.seed, "frame", epoch, index)
        when, coin = torch.rand(2, len(chosen), generator=generator)
        rows = self.rows(len(chosen))
        problems = rows_of(self.problems, chosen[rows].numpy())
        sketch = self.task.sketch(problems, self.stride)
        count = torch.from_numpy(num_frames(problems, self.stride))
        return {
            "canvas": torch.from_numpy(sketch.canvas),
            "arrival": torch.from_numpy(sketch.arrival),
            "label": torch.from_numpy(problems["label"].astype(np.int64)),
            "num_frames": count,
            "difficulty": torch.from_numpy(problems["difficulty"].astype(np.int64)),
            "t": torch.minimum((when[rows] * (count + 1)).long(), count),
            "coin": coin[rows].clone(),
        }


class VisualScratchpadTasks(ZooDataModule):
    """Mazes, cycles or strings, with more solution steps out of distribution than in training, at one image size.

    Validation and testing have two loaders each: the training difficulty (`id`) and, where `ood_difficulty` is given,
    the harder one (`ood`). Training problems are drawn once, at the start.

    Args:
        task: `rect_maze`, `circ_maze`, `cycles` or `strings`.
        size: Cells along a side (`rect_maze`), number of rings (`circ_maze`), fixed places on the circle (`cycles`;
            None for as many places as nodes, turned at random), or solver steps for a string as long as the picture
            is wide (`strings`; None for 5).
        image_size: Height and width in pixels.
        train_difficulty: Least and largest path length (mazes) or number of nodes (cycles, strings), both included.
        ood_difficulty: The same for the problems out of distribution, all harder than in training; None for none.
        stride: Solver steps from one frame to the next, `k`.
        train_size: Problems to train on.
        val_size: Problems of each validation set; an even number gives equally many of both answers.
        test_size: Problems of each test set.
        batch_size: Global batch size in training.
        eval_batch_size: Global batch size in validation and test.
        num_workers: Loader processes.
        data_seed: Seed of problems, order and drawn frames.

    Raises:
        ValueError: If such problems do not exist, cannot be drawn at this size, or the ranges overlap.
    """

    def __init__(
        self,
        task: str = "rect_maze",
        size: int | None = 6,
        image_size: int = 24,
        train_difficulty: list[int] = [5, 10],  # noqa: B006 - never changed; a list is what the command line shows
        ood_difficulty: list[int] | None = None,
        stride: int = 1,
        train_size: int = 20000,
        val_size: int = 100,
        test_size: int = 1000,
        batch_size: int = 64,
        eval_batch_size: int = 250,
        num_workers: int = 0,
        data_seed: int = 0,
    ) -> None:
        super().__init__(num_workers, data_seed)
        self.task = make_task(task, image_size, size)
        for key, bounds in (("train_difficulty", train_difficulty), ("ood_difficulty", ood_difficulty)):
            if bounds is None:
                continue
            if len(bounds) != 2:
                raise ValueError(f"{key}={bounds}: expected two numbers, the least and the largest difficulty")
            self.task.check(*bounds)
        if ood_difficulty is not None and ood_difficulty[0] <= train_difficulty[1]:
            raise ValueError(
                f"ood_difficulty={ood_difficulty} overlaps train_difficulty={train_difficulty}: expected it to start "
                f"at {train_difficulty[1] + 1} or later"
            )
        for key, value in (("stride", stride), ("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value < 1:
                raise ValueError(f"{key}={value}: expected at least 1")
        for key, value in (("train_size", train_size), ("val_size", val_size), ("test_size", test_size)):
            if value < 2 or value % 2:
                raise ValueError(
                    f"{key}={value}: expected an even number of at least 2, half of it with the answer yes"
                )
        if train_size < batch_size:
            raise ValueError(f"train_size={train_size} is smaller than batch_size={batch_size}")
        self.train_difficulty, self.ood_difficulty = train_difficulty, ood_difficulty
        self.stride, self.train_size, self.val_size, self.test_size = stride, train_size, val_size, test_size
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self._pools: dict[str, Problems] = {}

    @property
    def image_size(self) -> int:
        """Height and width in pixels."""
        return self.task.image_size

    @property
    def cell_size(self) -> int:
        """Pixels from one cell of a square grid to the next, 0 for other tasks."""
        return self.task.cell_size

    @property
    def longest_solution(self) -> int:
        """Upper bound of the number of frames, out of distribution included."""
        hardest = (self.ood_difficulty or self.train_difficulty)[1]
        return -(-self.task.longest(hardest) // self.stride)

    @property
    def palette(self) -> list[list[float]]:
        """Colours of the pictures, RGB fractions."""
        return [list(colour) for colour in PALETTE]

    def setup(self, stage: str) -> None:
        """Draw the problems that the stage needs."""
        if stage == "fit":
            self._draw("train", self.train_size, self.train_difficulty)
        for split, size, stages in (
            ("val", self.val_size, ("fit", "validate")),
            ("test", self.test_size, ("test", "predict")),
        ):
            if stage in stages:
                self._draw(f"{split}_id", size, self.train_difficulty)
                if self.ood_difficulty is not None:
                    self._draw(f"{split}_ood", size, self.ood_difficulty)

    def _draw(self, split: str, size: int, difficulty: list[int]) -> None:
        if split not in self._pools:
            self._pools[split] = problem_pool(self.task, self.data_seed, split, size, *difficulty)

    def batches(self, split: str) -> ScratchpadBatches:
        """Batches of `train`, `val_id`, `val_ood`, `test_id` or `test_ood`."""
        train = split == "train"
        size = self.batch_size if train else self.eval_batch_size
        return ScratchpadBatches(self.task, self._pools[split], self.stride, size, self.data_seed, shuffle=train)

    def _eval_loaders(self, split: str) -> list[ResumableLoader]:
        names = ["id"] if self.ood_difficulty is None else ["id", "ood"]
        return [self.loader(self.batches(f"{split}_{name}"), same_every_epoch=True) for name in names]

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled training problems."""
        return self.loader(self.batches("train"))

    def val_dataloader(self) -> list[ResumableLoader]:
        """Validation problems in and out of distribution."""
        return self._eval_loaders("val")

    def test_dataloader(self) -> list[ResumableLoader]:
        """Test problems in and out of distribution."""
        return self._eval_loaders("test")

    def predict_dataloader(self) -> list[ResumableLoader]:
        """The test problems."""
        return self._eval_loaders("test")
