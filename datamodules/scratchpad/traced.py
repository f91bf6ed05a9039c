"""Cycles and strings whose sketch follows the lines pixel by pixel, its newest part in red: steps local in the picture.

In `Cycles` a step colours whole lines, which is a local step to who finds the other end of a line. Here it colours the
next few pixels, so that the next frame follows from small windows of the one before. Where lines cross, the red front
and the blue behind it say which way the colour came. Strings advance by pixels anyway, but without the front.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from datamodules.scratchpad.datamodule import VisualScratchpadTasks
from datamodules.scratchpad.loops import INK, Cycles, Loops
from datamodules.scratchpad.strings import Strings
from datamodules.scratchpad.tasks import NEVER, RED, Problems, Sketch, frame_indices


class Traced(Loops):
    """Tracing, for either of the two loop tasks.

    The start is red. What a step colours is red in its frame and blue from the next one on; the last frame has no red.
    """

    advance: int

    def set_steps(self, advance: int) -> None:
        """Set the pixels of a step.

        Raises:
            ValueError: If there are too few or too many.
        """
        if not 3 <= advance <= self.image_size:
            raise ValueError(f"advance={advance} pixels in a step: expected 3 to image_size={self.image_size}")
        self.advance = advance

    def check(self, low: int, high: int) -> None:
        """Require that frames are counted by a byte, and what the task requires."""
        super().check(low, high)
        if self.longest(high) >= INK:
            raise ValueError(
                f"advance={self.advance} pixels in a step and {high} nodes: up to {self.longest(high)} frames, "
                f"expected fewer than {INK}"
            )

    def count_steps(self, problems: Problems) -> NDArray[np.int64]:
        """Step after the last one that colours a visible pixel; read from the picture: crossings may hide an end."""
        arrival = self.pixels(problems).arrival
        return np.where(arrival == NEVER, 0, arrival).max(axis=(1, 2)).astype(np.int64) + 1

    def pixels(self, problems: Problems) -> Sketch:
        """Draw as the task does, the start in red."""
        canvas, arrival = super().pixels(problems)
        return Sketch(np.where(arrival == 0, np.uint8(RED), canvas), arrival)


class TracedCycles(Traced, Cycles):
    """The questions of `Cycles`; each solver step colours the next `advance` pixels of the cycle, in both directions.

    Args:
        image_size: Height and width in pixels.
        advance: Pixels of a step, at least 3; so few may vanish below a crossing, where from 6 on something shows.
        places: As in `Cycles`.

    Raises:
        ValueError: If `advance` is out of range.

    Departures:
        A design of ours, after the strings, whose colour advances by arc length too, and after text scratchpads, whose
        state names the nodes that the search is at.
    """

    name: ClassVar[str] = "traced_cycles"

    def __init__(self, image_size: int, advance: int = 6, places: int | None = None) -> None:
        super().__init__(image_size, places)
        self.set_steps(advance)
        self._along: dict[int, NDArray[np.float32]] = {}

    def longest(self, high: int) -> int:
        """Steps for half a cycle of diameters, and one for the red to go."""
        return int(np.ceil(high * 0.42 * self.image_size / self.advance)) + 1

    def along(self, ticks: int, grain: int) -> NDArray[np.float32]:
        """Distance of each pixel in the table of lines from the tick that its line leads from, `[lines, L]`."""
        if ticks not in self._along:
            lines, _ = self.pixel_tables(ticks, grain)
            spots, half = self.centres(np.arange(ticks) / ticks), ticks // grain // 2
            start = np.repeat(np.arange(ticks), half)
            chord = spots[(start + grain * np.tile(np.arange(1, half + 1), ticks)) % ticks] - spots[start]
            length = np.hypot(*chord.T)[:, None]
            away = np.stack([lines % self.image_size, lines // self.image_size], axis=-1) - spots[start][:, None]
            self._along[ticks] = np.clip((away * chord[:, None]).sum(axis=-1) / length, 0, length).astype(np.float32)
        return self._along[ticks]

    def marks(self, problems: Problems) -> NDArray[np.uint8]:
        """Step in which each pixel is coloured, by its distance from the nearest start along its cycle."""
        nodes, n = problems["difficulty"].astype(np.int64), len(problems["label"])
        problems = {**problems, "loop": problems["loop"][:, : nodes[0]]}
        ticks, grain = int(self.ticks(problems)[0]), int(self.grain(nodes)[0])
        lines, dots = self.pixel_tables(ticks, grain)
        tick, gap = self.gaps(problems)
        chord = tick * (ticks // grain // 2) + gap - 1
        dot = np.take_along_axis(problems["tick"], problems["loop"].astype(np.int64), axis=1)
        along = self.along(ticks, grain)[chord]

        length = 2 * 0.42 * self.image_size * np.sin(np.pi * gap * grain / ticks)
        inside = np.arange(nodes[0])[None] < self.first_component(problems)[:, None]
        begin = np.cumsum(length, axis=1) - length
        total = np.where(inside, length, 0).sum(axis=1)[:, None, None]
        backwards = (tick != dot)[..., None]  # the table lists such a line from its far end
        at = begin[..., None] + np.where(backwards, length[..., None] - along, along)
        last = np.ceil((total / 2 - 3) / self.advance)

        marks = np.full(n * self.image_size**2, NEVER, dtype=np.uint8)
        offset = np.arange(n)[:, None, None] * self.image_size**2
        for table, row, distance in ((lines, chord, at), (dots, dot, begin[..., None])):
            near = np.minimum(distance, total - distance).clip(min=0)
            step = np.where(inside[..., None], np.minimum(np.ceil(near / self.advance), last), INK).astype(np.uint8)
            where = table[row] + offset
            np.minimum.at(marks, where.reshape(-1), np.broadcast_to(step, where.shape).reshape(-1))
        return marks.reshape(n, self.image_size, self.image_size)


class TracedStrings(Traced, Strings):
    """The questions of `Strings`; each solver step colours the next `advance` pixels of the string, in both directions.

    Args:
        image_size: Height and width in pixels.
        advance: Pixels of a step, at least 3.

    Raises:
        ValueError: If `advance` is out of range.

    Departures:
        The red front and the pixels of a step are ours.
    """

    name: ClassVar[str] = "traced_strings"

    def __init__(self, image_size: int, advance: int = 6) -> None:
        super().__init__(image_size)
        self.set_steps(advance)

    def longest(self, high: int) -> int:
        """Half the bound of the string's length, and one step for the red to go."""
        diagonal = 0.76 * np.sqrt(2) * self.image_size
        return int(np.ceil(high * (diagonal + diagonal * 2 / 3) / 2 / self.advance)) + 1

    def arrival_of(self, distance: NDArray) -> NDArray[np.uint8]:
        """Step in which points at `distance` `[n, m, P]` from the start are coloured.

        A rest of less than three pixels belongs to the step before it, where it could be hidden by a crossing.
        """
        farthest = np.where(np.isfinite(distance), distance, 0).max(axis=(1, 2), keepdims=True)
        steps = np.minimum(np.ceil(distance / self.advance), np.ceil((farthest - 3) / self.advance))
        return np.where(np.isfinite(distance), steps, NEVER).astype(np.uint8)


def traced_frame(sketch: Sketch, t: int | NDArray[np.integer]) -> NDArray[np.uint8]:
    """Palette indices `[n, H, W]` of frame `t`, a number or `[n]`: red where new, blue where coloured before."""
    new = sketch.arrival == np.asarray(t).reshape(-1, 1, 1)
    return np.where(new & (sketch.arrival != NEVER), np.uint8(RED), frame_indices(sketch, t))


#: Tasks that `VisualScratchpadTraced` takes.
TRACED: dict[str, type[TracedCycles] | type[TracedStrings]] = {"cycles": TracedCycles, "strings": TracedStrings}


class VisualScratchpadTraced(VisualScratchpadTasks):
    """Batches of `TracedCycles` or `TracedStrings`, for networks that show frames as `traced_frame` does.

    Args:
        task: `cycles` or `strings`.
        image_size: Height and width in pixels.
        advance: Pixels of the loop that a step colours, each way.
        train_difficulty: Least and largest number of nodes, both included.
        ood_difficulty: The same for the problems out of distribution, all with more nodes; None for none.
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
        task: str = "cycles",
        image_size: int = 48,
        advance: int = 6,
        train_difficulty: list[int] = [12, 12],  # noqa: B006 - never changed; a list is what the command line shows
        ood_difficulty: list[int] | None = None,
        train_size: int = 20000,
        val_size: int = 100,
        test_size: int = 1000,
        batch_size: int = 16,
        eval_batch_size: int = 250,
        num_workers: int = 0,
        data_seed: int = 0,
    ) -> None:
        if task not in TRACED:
            raise ValueError(f"task={task!r}: expected one of {', '.join(TRACED)}")
        super().__init__(
            task=task, size=None, image_size=image_size, train_difficulty=train_difficulty,
            ood_difficulty=ood_difficulty, train_size=train_size, val_size=val_size, test_size=test_size,
            batch_size=batch_size, eval_batch_size=eval_batch_size, num_workers=num_workers, data_seed=data_seed,
        )  # fmt: skip
        self.task = TRACED[task](image_size, advance)
        self.task.check(*(ood_difficulty or train_difficulty))
