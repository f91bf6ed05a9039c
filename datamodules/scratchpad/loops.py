"""Cycles and strings: one closed loop through all nodes, or two loops through half of them each?

Any set of fewer than `n` edges has the same law in both classes, since both are made by the same uniform order of the
nodes; only where the loop closes differs.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from datamodules.scratchpad.tasks import BLACK, BLUE, NEVER, WHITE, Problems, Sketch, Task, rows_of


def stamp(
    arrival: NDArray[np.uint8], ink: NDArray[np.bool_], points: NDArray, when: NDArray[np.uint8], radius: float
) -> None:
    """Paint discs: pixels within `radius` of a point are inked and become blue with the first point that covers them.

    Args:
        arrival: Frame in which a pixel turns blue, `[n, H, W]`, lowered in place.
        ink: Inked pixels, `[n, H, W]`, set in place.
        points: Centres `(x, y)` in pixels, pixel centres being whole numbers, `[n, K, 2]`.
        when: Frame in which the point turns blue, `[n, K]`.
        radius: Radius in pixels.
    """
    n, height, width = arrival.shape
    points = points.astype(np.float32)
    corner = np.ceil(points - np.float32(radius))
    x, y = corner[..., 0], corner[..., 1]
    away_x, away_y = x - points[..., 0], y - points[..., 1]
    column, row = x.astype(np.int32), y.astype(np.int32)
    flat = (np.arange(n, dtype=np.int32) * (height * width))[:, None] + row * width + column
    whole = bool(len(column)) and min(column.min(), row.min()) >= 0
    whole = whole and max(column.max(), row.max()) + int(2 * radius) < min(height, width)
    reach = range(int(2 * radius) + 1)
    squares_x, squares_y = ([(away + step) ** 2 for step in reach] for away in (away_x, away_y))
    for down in reach:
        for right in reach:
            inside = squares_x[right] + squares_y[down] < radius**2
            if not whole:
                inside &= (row + down >= 0) & (row + down < height) & (column + right >= 0) & (column + right < width)
            chosen, times = flat[inside] + (down * width + right), when[inside]
            ink.reshape(-1)[chosen] = True
            np.minimum.at(arrival.reshape(-1), chosen, times)


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
    def strokes(self, problems: Problems) -> tuple[NDArray, NDArray[np.uint8], NDArray, NDArray[np.uint8], float]:
        """Points of the curves and of the dots with their times, and the dots' radius.

        All problems have the same number of nodes `m`: points `[n, m * P, 2]`, times `[n, m * P]`, dots `[n, K, 2]`,
        times `[n, K]`.
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
        n = len(problems["label"])
        shape = (n, self.image_size, self.image_size)
        arrival, ink = np.full(shape, NEVER, dtype=np.uint8), np.zeros(shape, dtype=bool)
        for nodes in np.unique(problems["difficulty"]):
            rows = np.flatnonzero(problems["difficulty"] == nodes)
            for part in np.array_split(rows, -(-len(rows) // 64)):  # small enough for the cache
                points, when, dots, dot_when, radius = self.strokes(rows_of(problems, part))
                times, marks = arrival[part], ink[part]
                stamp(times, marks, points, when, 0.75)
                stamp(times, marks, dots, dot_when, radius)
                arrival[part], ink[part] = times, marks
        start = arrival == 0
        canvas = np.where(start, np.uint8(BLUE), np.where(ink, np.uint8(BLACK), np.uint8(WHITE)))
        return Sketch(canvas, arrival)

    def global_cues(self, problems: Problems) -> dict[str, NDArray]:
        """Number of frames: the start's loop is twice as long when there is only one."""
        return {"steps": problems["steps"]}


class Cycles(Loops):
    """`2 n` nodes on a circle, joined by straight lines to one cycle of length `2 n` or two cycles of length `n`.

    The nodes sit at equal angles after a random rotation, in a uniformly random order; node 0 is the start and blue.
    Each solver step makes the lines at blue nodes and the nodes at their other ends blue.

    Args:
        image_size: Height and width in pixels.
    """

    name: ClassVar[str] = "cycles"
    least_nodes: ClassVar[int] = 6  # two triangles; shorter cycles would need double edges

    def check(self, low: int, high: int) -> None:
        """Require that lines do not run within two pixels of each other over more than 30 % of their length."""
        super().check(low, high)
        radius, angle = 0.42 * self.image_size, np.pi / high
        spacing, parallel = 2 * radius * np.sin(angle), radius * (np.cos(angle) - np.cos(3 * angle))
        if spacing < 2 / 0.3 or parallel < 2:
            raise ValueError(
                f"image_size={self.image_size} is too small to tell the lines of {high} nodes apart: neighbours "
                f"are {spacing:.1f} pixels apart (at least 6.7) and parallel lines {parallel:.1f} (at least 2)"
            )

    def longest(self, high: int) -> int:
        """Half of the longest cycle."""
        return high // 2

    def place(self, nodes: NDArray, high: int, rng: np.random.Generator) -> Problems:
        """Draw the rotation, in turns."""
        return {"rotation": rng.random(len(nodes), dtype=np.float32)}

    def count_steps(self, problems: Problems) -> NDArray[np.int64]:
        """Half of the start's cycle, rounded up: both directions at once."""
        return -(-self.first_component(problems) // 2)

    def positions(self, problems: Problems) -> NDArray[np.float64]:
        """Centre `(x, y)` of every node in pixels, `[n, most nodes, 2]`; meaningless for nodes that do not exist."""
        node = np.arange(problems["loop"].shape[1])
        angle = 2 * np.pi * (problems["rotation"][:, None] + node / problems["difficulty"][:, None])
        centre = (self.image_size - 1) / 2
        return centre + 0.42 * self.image_size * np.stack([np.cos(angle), np.sin(angle)], axis=-1)

    def hops(self, problems: Problems) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Step in which the node at each place of `loop`, and the line to the next one, turn blue; `[n, most]`."""
        place, first = np.arange(problems["loop"].shape[1])[None], self.first_component(problems)[:, None]
        node = np.minimum(place, first - place)
        line = np.minimum(node, np.minimum(place + 1, first - place - 1)) + 1
        inside = place < first
        return np.where(inside, node, NEVER).astype(np.uint8), np.where(inside, line, NEVER).astype(np.uint8)

    def strokes(self, problems: Problems) -> tuple[NDArray, NDArray[np.uint8], NDArray, NDArray[np.uint8], float]:
        """One point for each pixel of the longest line, and a dot at each node."""
        m = int(problems["difficulty"][0])
        problems = {**problems, "loop": problems["loop"][:, :m]}
        rows = np.arange(len(problems["label"]))[:, None]
        centres = self.positions(problems).astype(np.float32)
        a, b = np.moveaxis(self.edge_list(problems), -1, 0)
        count = int(np.ceil(0.84 * self.image_size)) + 1
        weight = np.linspace(0, 1, count, dtype=np.float32)[:, None]
        points = centres[rows, a][:, :, None] * (1 - weight) + centres[rows, b][:, :, None] * weight
        node, line = self.hops(problems)
        times = np.repeat(line, count, axis=1)
        dots = centres[rows, problems["loop"]]
        return points.reshape(len(rows), -1, 2), times, dots, node, max(1.5, 0.025 * self.image_size)

    def local_cues(self, problems: Problems) -> dict[str, NDArray]:
        """Ink, line lengths, and lines between neighbours on the circle."""
        a, b = np.moveaxis(self.edge_list(problems), -1, 0)
        nodes = problems["difficulty"].astype(np.int64)[:, None]
        real = a >= 0
        apart = abs(a - b)
        apart = np.where(real, np.minimum(apart, nodes - apart), 0)
        return {
            "total length": np.where(real, np.sin(np.pi * apart / nodes), 0).sum(axis=1),
            "longest line": apart.max(axis=1),
            "shortest line": np.where(real, apart, 999).min(axis=1),
            "lines between neighbours": ((apart == 1) & real).sum(axis=1),
            "first line of the start": apart[:, 0],
        }

    def global_cues(self, problems: Problems) -> dict[str, NDArray]:
        """Number of frames, and the exact number of crossings, whose parity depends on the number of cycles."""
        a, b = np.moveaxis(self.edge_list(problems), -1, 0)
        low, high = np.minimum(a, b)[:, :, None], np.maximum(a, b)[:, :, None]
        first, last = low.swapaxes(1, 2), high.swapaxes(1, 2)
        crossings = ((low < first) & (first < high) & (high < last)).sum(axis=(1, 2))
        return {**super().global_cues(problems), "crossings": crossings}


class Strings(Loops):
    """The smooth version of cycles: closed strings through invisible anchors, one through all or two through half.

    Consecutive anchors are joined by cubic Bezier pieces with Catmull-Rom tangents (tension 0.5). Anchors are uniform
    in the picture, at least `0.1 * image_size` apart; a blue dot marks the topmost one. Each solver step makes the next
    `0.2 * image_size` pixels of the string blue, in both directions.

    Args:
        image_size: Height and width in pixels.

    Departures:
        The paper's text is not available here. Blue advances by arc length and not by anchors, since anchors cannot be
        seen and the next frame has to follow from the one before.
    """

    name: ClassVar[str] = "strings"
    least_nodes: ClassVar[int] = 8  # with three anchors the tangents would show that the loop is short

    def check(self, low: int, high: int) -> None:
        """Require room for the anchors and at least 32 pixels."""
        super().check(low, high)
        if self.image_size < 32 or high > 28:
            raise ValueError(
                f"image_size={self.image_size} with up to {high} anchors: expected at least 32 pixels and at most "
                "28 anchors"
            )

    def longest(self, high: int) -> int:
        """Half the bound of the string's length: a piece is no longer than its control polygon."""
        diagonal = 0.76 * np.sqrt(2)
        return int(np.ceil(high * (diagonal + diagonal * 2 / 3) / 2 / 0.2))

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

    def curve(self, problems: Problems) -> tuple[NDArray, NDArray]:
        """Points of every piece in pixels, `[n, m, P, 2]`, and the distance of each from the start along its loop.

        All problems have the same number of nodes `m`. Piece `j` leads from the anchor at place `j` of `loop` to the
        next one, its end left out. The distance `[n, m, P]` is the shorter way round, infinite on the other loop.
        """
        m = int(problems["difficulty"][0])
        problems = {**problems, "loop": problems["loop"][:, :m]}
        n = len(problems["label"])
        rows = np.arange(n)[:, None]
        following = self.next_place(problems)
        before = following.argsort(axis=1)
        at = problems["anchors"][rows, problems["loop"]].astype(np.float64) * (self.image_size - 1)
        tangent = 0.5 * (at[rows, following] - at[rows, before])
        p0, p3 = at[:, :, None], at[rows, following][:, :, None]
        p1, p2 = p0 + tangent[:, :, None] / 3, p3 - tangent[rows, following][:, :, None] / 3
        count = int(1.5 * self.image_size)
        t = np.linspace(0, 1, count, endpoint=False)[:, None]
        points = (1 - t) ** 3 * p0 + 3 * t * (1 - t) ** 2 * p1 + 3 * t**2 * (1 - t) * p2 + t**3 * p3
        ends = np.concatenate([points[:, :, 1:], p3], axis=2)
        length = np.hypot(*np.moveaxis(ends - points, -1, 0)).reshape(n, -1)
        along = np.cumsum(length, axis=1) - length
        inside = np.arange(m * count)[None] < self.first_component(problems)[:, None] * count
        total = np.where(inside, length, 0).sum(axis=1, keepdims=True)
        distance = np.where(inside, np.minimum(along, total - along), np.inf)
        return points, distance.reshape(n, m, count)

    def arrival_of(self, distance: NDArray) -> NDArray[np.uint8]:
        """Step in which points at `distance` `[n, m, P]` from the start turn blue.

        A rest of less than three pixels belongs to the step before it, where it could be hidden by a crossing.
        """
        unit = 0.2 * self.image_size
        farthest = np.where(np.isfinite(distance), distance, 0).max(axis=(1, 2), keepdims=True)
        steps = np.minimum(np.ceil(distance / unit), np.ceil((farthest - 3) / unit))
        return np.where(np.isfinite(distance), steps, NEVER).astype(np.uint8)

    def count_steps(self, problems: Problems) -> NDArray[np.int64]:
        """Step in which the last visible pixel turns blue; read from the picture, since crossings may hide an end."""
        arrival = self.pixels(problems).arrival
        return np.where(arrival == NEVER, 0, arrival).max(axis=(1, 2)).astype(np.int64)

    def strokes(self, problems: Problems) -> tuple[NDArray, NDArray[np.uint8], NDArray, NDArray[np.uint8], float]:
        """The curves and one dot at the start."""
        points, distance = self.curve(problems)
        n = len(points)
        start = problems["anchors"][:, :1].astype(np.float64) * (self.image_size - 1)
        times = self.arrival_of(distance).reshape(n, -1)
        return (
            points.reshape(n, -1, 2),
            times,
            start,
            np.zeros((n, 1), dtype=np.uint8),
            max(2.0, 0.03 * self.image_size),
        )

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
