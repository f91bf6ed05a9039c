"""Strings, the smooth version of cycles: is it one closed string, or two?"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from datamodules.scratchpad.loops import INK, Loops
from datamodules.scratchpad.strokes import stamp
from datamodules.scratchpad.tasks import NEVER, Problems


class Strings(Loops):
    """The smooth version of cycles: closed strings through invisible anchors, one through all or two through half.

    Consecutive anchors are joined by cubic Bezier pieces with Catmull-Rom tangents (tension 0.5). Anchors are uniform
    in the picture, at least `0.1 * image_size` apart; a blue dot marks the topmost one. Each solver step makes the next
    `image_size / steps_across` pixels of the string blue, in both directions.

    Args:
        image_size: Height and width in pixels.
        steps_across: Solver steps for a string as long as the picture is wide; more make each step more local.

    Departures:
        The paper's text is not available here. Blue advances by arc length and not by anchors, since anchors cannot be
        seen and the next frame has to follow from the one before.
    """

    name: ClassVar[str] = "strings"
    least_nodes: ClassVar[int] = 8  # with three anchors the tangents would show that the loop is short

    def __init__(self, image_size: int, steps_across: int = 5) -> None:
        super().__init__(image_size)
        if steps_across < 1 or image_size < 3 * steps_across:
            raise ValueError(
                f"size={steps_across} steps across {image_size} pixels: expected at least 1, of at least 3 pixels each"
            )
        self.steps_across = steps_across

    def check(self, low: int, high: int) -> None:
        """Require room for the anchors and at least 32 pixels."""
        super().check(low, high)
        if self.image_size < 32 or high > 28:
            raise ValueError(
                f"image_size={self.image_size} with up to {high} anchors: expected at least 32 pixels and at most "
                "28 anchors"
            )
        if self.longest(high) >= INK:
            raise ValueError(
                f"size={self.steps_across} steps across the picture and {high} anchors: up to {self.longest(high)} "
                f"frames, expected fewer than {INK}"
            )

    def longest(self, high: int) -> int:
        """Half the bound of the string's length: a piece is no longer than its control polygon."""
        diagonal = 0.76 * np.sqrt(2)
        return int(np.ceil(high * (diagonal + diagonal * 2 / 3) / 2 * self.steps_across))

    def place(self, nodes: NDArray, high: int, rng: np.random.Generator) -> Problems:
        """Throw anchors one after the other into the free room, as fractions of the image; the top one is node 0."""
        n = len(nodes)
        anchors = np.full((n, high, 2), np.inf)
        for index in range(high):
            pending = np.flatnonzero(index < nodes)
            while len(pending):
                spot = 0.12 + 0.76 * rng.random((len(pending), 2))
                gap = ((anchors[pending, :index] - spot[:, None]) ** 2).sum(axis=-1).min(axis=1, initial=np.inf)
                free = gap >= 0.01
                anchors[pending[free], index] = spot[free]
                pending = pending[~free]
        top = anchors[:, :, 1].argmin(axis=1)
        rows = np.arange(n)
        anchors[rows, top], anchors[rows, 0] = anchors[rows, 0].copy(), anchors[rows, top].copy()
        return {"anchors": np.where(np.isfinite(anchors), anchors, 0).astype(np.float32)}

    def curve(self, problems: Problems) -> tuple[NDArray, NDArray, NDArray]:
        """Points of every piece in pixels, and how far along the strings they lie.

        All problems have the same number of nodes `m`. Piece `j` leads from the anchor at place `j` of `loop` to the
        next one, its end left out.

        Returns:
            Points `(x, y)`, `[2, n, m, P]`; length of string before each point, both loops in turn, `[n, m, P]`; and
            its distance from the start, the shorter way round, infinite on the other loop, `[n, m, P]`.
        """
        m = int(problems["difficulty"][0])
        problems = {**problems, "loop": problems["loop"][:, :m]}
        n = len(problems["label"])
        rows = np.arange(n)[:, None]
        following = self.next_place(problems)
        before = following.argsort(axis=1)
        anchors = np.moveaxis(problems["anchors"].astype(np.float64) * (self.image_size - 1), -1, 0)
        at = anchors[:, rows, problems["loop"]]
        tangent = 0.5 * (at[:, rows, following] - at[:, rows, before])
        p0, p3 = at[..., None], at[:, rows, following][..., None]
        p1, p2 = p0 + tangent[..., None] / 3, p3 - tangent[:, rows, following][..., None] / 3
        count = int(1.5 * self.image_size)
        t = np.linspace(0, 1, count, endpoint=False)
        slope, bend = 3 * (p1 - p0), 3 * (p2 - 2 * p1 + p0)
        points = (((p3 - 3 * p2 + 3 * p1 - p0) * t + bend) * t + slope) * t + p0
        chord = np.diff(points, axis=-1, append=p3)
        length = np.sqrt(np.square(chord).sum(axis=0)).reshape(n, -1)
        along = np.cumsum(length, axis=1) - length
        inside = np.arange(m * count)[None] < self.first_component(problems)[:, None] * count
        total = np.where(inside, length, 0).sum(axis=1, keepdims=True)
        distance = np.where(inside, np.minimum(along, total - along), np.inf)
        return points, along.reshape(n, m, count), distance.reshape(n, m, count)

    def arrival_of(self, distance: NDArray) -> NDArray[np.uint8]:
        """Step in which points at `distance` `[n, m, P]` from the start turn blue.

        A rest of less than three pixels belongs to the step before it, where it could be hidden by a crossing.
        """
        unit = self.image_size / self.steps_across
        farthest = np.where(np.isfinite(distance), distance, 0).max(axis=(1, 2), keepdims=True)
        steps = np.minimum(np.ceil(distance / unit), np.ceil((farthest - 3) / unit))
        return np.where(np.isfinite(distance), steps, NEVER).astype(np.uint8)

    def count_steps(self, problems: Problems) -> NDArray[np.int64]:
        """Step in which the last visible pixel turns blue; read from the picture, since crossings may hide an end."""
        arrival = self.pixels(problems).arrival
        return np.where(arrival == NEVER, 0, arrival).max(axis=(1, 2)).astype(np.int64)

    def marks(self, problems: Problems) -> NDArray[np.uint8]:
        """The curves, and one dot at the start."""
        points, along, distance = self.curve(problems)
        n = len(along)
        marks = np.full((n, self.image_size, self.image_size), NEVER, dtype=np.uint8)
        times = np.minimum(self.arrival_of(distance), INK)
        turn = np.floor(along * 2).astype(np.int16)  # one point every half pixel, and all where the time changes
        kept = np.ones(turn.shape, dtype=bool)
        kept[:, :, 1:] = (turn[:, :, 1:] != turn[:, :, :-1]) | (times[:, :, 1:] != times[:, :, :-1])
        index = np.flatnonzero(kept)
        stamp(marks, index // kept[0].size, points.reshape(2, -1)[:, index], times.reshape(-1)[index], 0.75)
        start = problems["anchors"][:, 0].T * (self.image_size - 1)
        stamp(marks, np.arange(n), start, np.zeros(n, dtype=np.uint8), max(2.0, 0.03 * self.image_size))
        return marks

    def local_cues(self, problems: Problems) -> dict[str, NDArray]:
        """Ink, and the shape of the string at its start."""
        nodes = problems["difficulty"].astype(np.int64)
        loop, following = problems["loop"].astype(np.int64), self.next_place(problems)
        following = np.minimum(following, loop.shape[1] - 1)
        rows = np.arange(len(loop))
        at = problems["anchors"][rows[:, None], np.maximum(loop, 0)].astype(np.float64)
        chord = np.where(loop >= 0, np.hypot(*np.moveaxis(at[rows[:, None], following] - at, -1, 0)), 0)
        last = self.first_component(problems) - 1
        opening = np.hypot(*np.moveaxis(at[rows, 1] - at[rows, last], -1, 0))
        return {
            "total length": chord.sum(axis=1),
            "longest piece": chord.max(axis=1),
            "distance of the start's neighbours": opening,
            "first piece of the start": chord[:, 0],
            "height of the start": problems["anchors"][:, 0, 1],
            "anchors": nodes,
        }
