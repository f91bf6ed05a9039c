"""Cycles: one closed loop through all nodes, or two loops through half of them each? And what strings share with it.

Any set of fewer than `n` edges has the same law in both classes, since both are made by the same uniform order of the
nodes; only where the loop closes differs.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from datamodules.scratchpad.strokes import segment_pixels
from datamodules.scratchpad.tasks import NEVER, Problems, Sketch, Task, rows_of

#: Mark of ink that never turns blue.
INK = NEVER - 1


class Loops(Task):
    """Base of the two loop tasks. Difficulty is the number of nodes, `2 n`.

    A problem holds `loop` `[n, most nodes]`, the nodes of the start's component in order from node 0, then those of the
    other one, padded by -1.
    """

    least_nodes: ClassVar[int]

    def check(self, low: int, high: int) -> None:
        """Require even numbers of nodes of at least `least_nodes`."""
        if low % 2 or high % 2:
            raise ValueError(f"difficulty {[low, high]} of {self.name}: the number of nodes must be even, to be halved")
        if not self.least_nodes <= low <= high < NEVER:
            raise ValueError(
                f"difficulty {[low, high]} of {self.name}: expected [low, high] with {self.least_nodes} <= low <= high"
            )

    def draw(self, n: int, low: int, high: int, rng: np.random.Generator) -> Problems:
        """Draw `n` problems with an even number of nodes, uniform in `low..high`."""
        nodes = rng.choice(np.arange(low, high + 1, 2), size=n)
        scores = rng.random((n, high))
        scores[:, 0] = -1
        scores[np.arange(high) >= nodes[:, None]] = 2
        loop = scores.argsort(axis=1, kind="stable")
        label = np.arange(n) % 2
        problems: Problems = {
            "loop": np.where(np.arange(high) < nodes[:, None], loop, -1).astype(np.int16),
            "label": label.astype(np.uint8),
            "difficulty": nodes.astype(np.int16),
            **self.place(nodes, high, rng),
        }
        return {**problems, "steps": self.count_steps(problems).astype(np.int16)}

    @abstractmethod
    def place(self, nodes: NDArray, high: int, rng: np.random.Generator) -> Problems:
        """Draw the geometry of problems with `nodes` `[n]` nodes."""

    @abstractmethod
    def count_steps(self, problems: Problems) -> NDArray[np.int64]:
        """Solver steps until the whole loop of the start is blue, `[n]`."""

    @abstractmethod
    def marks(self, problems: Problems) -> NDArray[np.uint8]:
        """Step in which each pixel turns blue, `[n, H, W]`: `INK` where it stays black, `NEVER` where it is white.

        All problems have the same number of nodes. Where strokes cross, the earliest one lies on top.
        """

    def next_place(self, problems: Problems) -> NDArray[np.int64]:
        """Place in `loop` that follows each place, `[n, most nodes]`; meaningless for padding."""
        width = problems["loop"].shape[1]
        place = np.arange(width)[None]
        nodes, first = problems["difficulty"].astype(np.int64)[:, None], self.first_component(problems)[:, None]
        following = np.where(place == first - 1, 0, place + 1)
        return np.where(place == nodes - 1, np.where(first == nodes, 0, first), following)

    def first_component(self, problems: Problems) -> NDArray[np.int64]:
        """Number of nodes of the start's loop, `[n]`."""
        nodes = problems["difficulty"].astype(np.int64)
        return np.where(problems["label"] == 1, nodes, nodes // 2)

    def edge_list(self, problems: Problems) -> NDArray[np.int64]:
        """Pairs of joined nodes `[n, most nodes, 2]`, padded by -1."""
        loop = problems["loop"].astype(np.int64)
        following = np.minimum(self.next_place(problems), loop.shape[1] - 1)
        other = np.where(loop >= 0, np.take_along_axis(loop, following, axis=1), -1)
        return np.stack([loop, other], axis=-1)

    def pixels(self, problems: Problems) -> Sketch:
        """Draw strokes of radius 0.75 pixels; where strokes cross, blue lies on top."""
        marks = np.empty((len(problems["label"]), self.image_size, self.image_size), dtype=np.uint8)
        at_once = max(1, 2**19 // self.image_size**2)  # small enough for the cache
        for nodes in np.unique(problems["difficulty"]):
            rows = np.flatnonzero(problems["difficulty"] == nodes)
            for part in np.array_split(rows, -(-len(rows) // at_once)):
                marks[part] = self.marks(rows_of(problems, part))
        canvas = (marks != NEVER).view(np.uint8) + (marks == 0)  # BLACK is 1 and BLUE is 2
        return Sketch(canvas, marks | (marks == INK))

    def global_cues(self, problems: Problems) -> dict[str, NDArray]:
        """Number of frames: the start's loop is twice as long when there is only one."""
        return {"steps": problems["steps"]}


class Cycles(Loops):
    """`2 n` nodes on a circle, joined by straight lines to one cycle of length `2 n` or two cycles of length `n`.

    The nodes sit at equal angles after a random rotation, by half pixels, or at random ones of `places` fixed places,
    in a uniformly random order. Node 0 is the start and blue. Each solver step makes the lines at blue nodes and the
    nodes at their other ends blue. Up to 10 nodes, sums over all lines tell the answer: see the table of leaks.

    Args:
        image_size: Height and width in pixels.
        places: Places on the circle; None for as many as nodes, and a random rotation.
    """

    name: ClassVar[str] = "cycles"
    least_nodes: ClassVar[int] = 6  # two triangles; shorter cycles would need double edges

    def __init__(self, image_size: int, places: int | None = None) -> None:
        super().__init__(image_size)
        if places is not None and places < self.least_nodes:
            raise ValueError(f"size={places} places on the circle: expected at least {self.least_nodes}")
        self.places = places
        self._pixels: dict[int, tuple[NDArray, NDArray]] = {}

    def check(self, low: int, high: int) -> None:
        """Require room between places and between parallel lines; lines may cross flatly all the same."""
        super().check(low, high)
        if self.places is not None and high > self.places:
            raise ValueError(f"difficulty {[low, high]} of {self.name}: expected at most size={self.places} nodes")
        places = self.places or high
        radius, angle = 0.42 * self.image_size, np.pi / places
        spacing, parallel = 2 * radius * np.sin(angle), radius * (np.cos(angle) - np.cos(3 * angle))
        if spacing < 2 / 0.3 or parallel < 2:
            raise ValueError(
                f"image_size={self.image_size} is too small to tell the lines of {places} nodes apart: neighbours "
                f"are {spacing:.1f} pixels apart (at least 6.7) and parallel lines {parallel:.1f} (at least 2)"
            )

    def longest(self, high: int) -> int:
        """Half of the longest cycle."""
        return high // 2

    def grain(self, nodes: NDArray) -> NDArray[np.int64]:
        """Steps of the rotation from one place to the next, of half a pixel at most, `[n]`; 1 if places are fixed."""
        around = 2 * np.pi * 0.42 * self.image_size
        return np.ones_like(nodes) if self.places else np.ceil(2 * around / nodes).astype(np.int64)

    def ticks(self, problems: Problems) -> NDArray[np.int64]:
        """Number of angles at which a node may sit, `[n]`."""
        nodes = problems["difficulty"].astype(np.int64)
        return self.grain(nodes) * (self.places or nodes)

    def place(self, nodes: NDArray, high: int, rng: np.random.Generator) -> Problems:
        """Draw the angle of every node, in ticks: which places are taken, or the rotation."""
        if self.places:
            return {"tick": rng.random((len(nodes), self.places)).argsort(axis=1)[:, :high].astype(np.int16)}
        grain = self.grain(nodes)
        ticks = grain * nodes
        tick = (rng.integers(0, ticks)[:, None] + grain[:, None] * np.arange(high)) % ticks[:, None]
        return {"tick": tick.astype(np.int16)}

    def count_steps(self, problems: Problems) -> NDArray[np.int64]:
        """Half of the start's cycle, rounded up: both directions at once."""
        return -(-self.first_component(problems) // 2)

    def centres(self, turn: NDArray) -> NDArray[np.float64]:
        """Points `(x, y)` of the circle in pixels, by angle in turns `[...]`."""
        angle = 2 * np.pi * turn
        centre = (self.image_size - 1) / 2
        return centre + 0.42 * self.image_size * np.stack([np.cos(angle), np.sin(angle)], axis=-1)

    def positions(self, problems: Problems) -> NDArray[np.float64]:
        """Centre `(x, y)` of every node in pixels, `[n, most nodes, 2]`; meaningless for nodes that do not exist."""
        return self.centres(problems["tick"] / self.ticks(problems)[:, None])

    def hops(self, problems: Problems) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Step in which the node at each place of `loop`, and the line to the next one, turn blue; `[n, most]`."""
        place, first = np.arange(problems["loop"].shape[1])[None], self.first_component(problems)[:, None]
        node = np.minimum(place, first - place)
        line = np.minimum(node, np.minimum(place + 1, first - place - 1)) + 1
        inside = place < first
        return np.where(inside, node, INK).astype(np.uint8), np.where(inside, line, INK).astype(np.uint8)

    def pixel_tables(self, ticks: int, grain: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Pixels of the line from each tick to the places at up to half a turn, and of the dot at each tick.

        Lines are drawn once for all problems with this number of nodes: `[ticks * (places // 2), L]` and `[ticks, L]`.
        """
        if ticks not in self._pixels:
            spots, half = self.centres(np.arange(ticks) / ticks), ticks // grain // 2
            start = np.repeat(np.arange(ticks), half)
            end = (start + grain * np.tile(np.arange(1, half + 1), ticks)) % ticks
            radius = max(1.5, 0.025 * self.image_size)
            lines = segment_pixels(spots[start], spots[end], self.image_size, 0.75)
            dots = segment_pixels(spots, spots, self.image_size, radius)
            self._pixels[ticks] = lines.astype(np.int32), dots.astype(np.int32)
        return self._pixels[ticks]

    def gaps(self, problems: Problems) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tick from which each line leads forwards, and over how many places, 0 for padding; `[n, most nodes]`."""
        a, b = np.moveaxis(self.edge_list(problems), -1, 0)
        rows, tick = np.arange(len(a))[:, None], problems["tick"].astype(np.int64)
        ticks, grain = self.ticks(problems)[:, None], self.grain(problems["difficulty"].astype(np.int64))[:, None]
        ahead = (tick[rows, b] - tick[rows, a]) % ticks
        backwards = 2 * ahead > ticks
        gap = np.where(backwards, ticks - ahead, ahead) // grain
        return tick[rows, np.where(backwards, b, a)], np.where(a >= 0, gap, 0)

    def marks(self, problems: Problems) -> NDArray[np.uint8]:
        """Look the pixels of every line and dot up."""
        nodes, n = problems["difficulty"].astype(np.int64), len(problems["label"])
        problems = {**problems, "loop": problems["loop"][:, : nodes[0]]}
        ticks, grain = int(self.ticks(problems)[0]), int(self.grain(nodes)[0])
        lines, dots = self.pixel_tables(ticks, grain)
        node, line = self.hops(problems)
        tick, gap = self.gaps(problems)
        dot = np.take_along_axis(problems["tick"], problems["loop"].astype(np.int64), axis=1)
        marks = np.full(n * self.image_size**2, NEVER, dtype=np.uint8)
        offset = np.arange(n)[:, None, None] * self.image_size**2
        for table, row, when in ((lines, tick * (ticks // grain // 2) + gap - 1, line), (dots, dot, node)):
            where = table[row] + offset
            np.minimum.at(marks, where.reshape(-1), np.repeat(when.reshape(-1), table.shape[1]))
        return marks.reshape(n, self.image_size, self.image_size)

    def local_cues(self, problems: Problems) -> dict[str, NDArray]:
        """Ink, line lengths, lines between neighbours on the circle, and the place of the start."""
        _, apart = self.gaps(problems)
        places = self.places or problems["difficulty"].astype(np.int64)[:, None]
        real = apart > 0
        return {
            "total length": np.sin(np.pi * apart / places).sum(axis=1),
            "longest line": apart.max(axis=1),
            "shortest line": np.where(real, apart, 999).min(axis=1),
            "lines between neighbours": (apart == 1).sum(axis=1),
            "first line of the start": apart[:, 0],
            "place of the start": problems["tick"][:, 0] / self.ticks(problems),
        }

    def global_cues(self, problems: Problems) -> dict[str, NDArray]:
        """Number of frames, and the exact number of crossings, whose parity depends on the number of cycles."""
        pairs = self.edge_list(problems)
        rows = np.arange(len(pairs))[:, None, None]
        pairs = np.where(pairs >= 0, problems["tick"].astype(np.int64)[rows, pairs], -1)
        low, high = pairs.min(axis=2)[:, :, None], pairs.max(axis=2)[:, :, None]
        first, last = low.swapaxes(1, 2), high.swapaxes(1, 2)
        crossings = ((low < first) & (first < high) & (high < last)).sum(axis=(1, 2))
        return {**super().global_cues(problems), "crossings": crossings}
