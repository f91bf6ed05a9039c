"""What the four connectivity tasks share: problems as arrays, drawn by key, and pictures of their solution.

A picture is two byte maps: `canvas`, the palette index of every pixel of the question, and `arrival`, the number of the
frame in which the pixel turns blue (`NEVER` if it does not). Frame `t` follows from both without rendering anything
again: blue where `arrival <= t`, else the canvas.
"""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

#: Colours as palette indices. No colour is blended with another one, so that a predicted frame can be snapped.
WHITE, BLACK, BLUE, RED = 0, 1, 2, 3
#: RGB of the palette, `[4, 3]`, fractions of full intensity.
PALETTE: tuple[tuple[float, float, float], ...] = ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (0.0, 0.0, 1.0), (1.0, 0.0, 0.0))
#: Arrival of a pixel, or distance of a cell, that the solver does not reach.
NEVER = 255
#: Problems that share one random stream. Part of the definition of a data set: another value gives other problems.
CHUNK = 1024

#: Problems as arrays with one row each. Every task has `label` (uint8, 0 or 1), `difficulty` (int16) and `steps`
#: (int16, solver steps of stride one until nothing changes); the other keys are the task's own.
Problems: TypeAlias = dict[str, NDArray]


class Sketch(NamedTuple):
    """Pictures of `n` problems and of their solution.

    Args:
        canvas: Palette indices of the question, uint8 `[n, H, W]`.
        arrival: First frame in which a pixel is blue, uint8 `[n, H, W]`, `NEVER` for pixels that keep their colour.
    """

    canvas: NDArray[np.uint8]
    arrival: NDArray[np.uint8]


class Task(ABC):
    """A generator of balanced yes/no questions about connectivity.

    Args:
        image_size: Height and width of the picture in pixels.
    """

    name: ClassVar[str]

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size

    @property
    def cell_size(self) -> int:
        """Pixels from one cell to the next where cells form a square grid, else 0."""
        return 0

    @abstractmethod
    def check(self, low: int, high: int) -> None:
        """Raise `ValueError` unless problems of difficulty `low` to `high` exist and can be drawn at this size."""

    @abstractmethod
    def draw(self, n: int, low: int, high: int, rng: np.random.Generator) -> Problems:
        """Draw `n` problems with a difficulty in `low..high`; row `i` has label `i % 2`."""

    @abstractmethod
    def pixels(self, problems: Problems) -> Sketch:
        """Draw the pictures; `arrival` counts solver steps of stride one and goes on after the answer is known."""

    @abstractmethod
    def longest(self, high: int) -> int:
        """Upper bound of `steps` over problems of difficulty at most `high`."""

    @abstractmethod
    def local_cues(self, problems: Problems) -> dict[str, NDArray]:
        """Numbers `[n]` that must not tell the label: what a shortcut would read."""

    @abstractmethod
    def global_cues(self, problems: Problems) -> dict[str, NDArray]:
        """Numbers `[n]` that may tell the label, since reading them takes as much as solving the problem."""

    def sketch(self, problems: Problems, stride: int = 1) -> Sketch:
        """Draw pictures whose frames advance by `stride` solver steps and stop once the answer is visible."""
        canvas, arrival = self.pixels(problems)
        count = num_frames(problems, stride).astype(np.uint8)
        frames = arrival if stride == 1 else np.where(arrival == NEVER, NEVER, -(-arrival.astype(np.int16) // stride))
        frames = frames.astype(np.uint8, copy=False)
        return Sketch(canvas, frames | _mask(frames > count[:, None, None]))


def _mask(chosen: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """255 where true, 0 elsewhere: bitwise operations on bytes are much faster than `np.where`."""
    return np.negative(chosen.view(np.uint8))


def num_frames(problems: Problems, stride: int = 1) -> NDArray[np.int64]:
    """Number `T` of frames after the question, `[n]`: `ceil(steps / stride)`."""
    return -(-problems["steps"].astype(np.int64) // stride)


def frame_indices(sketch: Sketch, t: int | NDArray[np.integer]) -> NDArray[np.uint8]:
    """Palette indices `[n, H, W]` of frame `t` (one number, or one per row `[n]`); later frames equal the last one."""
    limit = np.minimum(np.asarray(t).reshape(-1, 1, 1), NEVER - 1).astype(np.uint8)
    return sketch.canvas ^ ((sketch.canvas ^ np.uint8(BLUE)) & _mask(sketch.arrival <= limit))


def rgb(indices: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Turn palette indices `[...]` into 8-bit colours `[..., 3]`."""
    return (np.asarray(PALETTE) * 255).astype(np.uint8)[indices]


def rows_of(problems: Problems, rows: slice | NDArray) -> Problems:
    """Select problems."""
    return {key: values[rows] for key, values in problems.items()}


def concatenate(parts: list[Problems]) -> Problems:
    """Join problems of one task, in order."""
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def problem_chunk(task: Task, seed: int, split: str, chunk: int, low: int, high: int) -> Problems:
    """Draw chunk `chunk` of a split: `CHUNK` problems that depend on nothing but the arguments."""
    key = [seed, zlib.crc32(split.encode()), chunk]
    return task.draw(CHUNK, low, high, np.random.default_rng(np.random.SeedSequence(key)))


def problem_pool(task: Task, seed: int, split: str, size: int, low: int, high: int, start: int = 0) -> Problems:
    """Problems `start .. start + size - 1` of a split, the labels alternating.

    Problem `i` depends on `(task, seed, split, i, low, high)` alone, in every process and for every `start` and `size`.
    Splits have streams of their own.

    Raises:
        ValueError: If no such problems exist.
    """
    task.check(low, high)
    if size < 1 or start < 0:
        raise ValueError(f"size={size}, start={start}: expected a size of at least 1 and a start of at least 0")
    first, last = start // CHUNK, (start + size - 1) // CHUNK
    pool = concatenate([problem_chunk(task, seed, split, chunk, low, high) for chunk in range(first, last + 1)])
    return rows_of(pool, slice(start - first * CHUNK, start - first * CHUNK + size))
