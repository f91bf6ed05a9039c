"""Rectangular and circular mazes: is the red cell reachable from the blue one?

Walls come first, the label second, so that no local cue tells the label. A maze is a random spanning tree with one edge
cut; the end is drawn from the start's side or from the lost side, from cells that agree in distance (in the uncut
tree), in their number of openings, in their place up to symmetry (corner, border, ...) and in their distance from the
start without walls. Both classes then have the same law of walls, start and all of these. Distance and openings are not
enough: the cell of the end alone would answer 61 % of the questions of 6 x 6 mazes, as the lost side lies nearer to the
border; and with its place matched, the distance without walls would answer 54 %.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from datamodules.scratchpad.tasks import BLACK, BLUE, NEVER, RED, WHITE, Problems, Sketch, Task, concatenate, rows_of

_ATTEMPTS = 2048  # mazes grown at once: large enough to hide the cost of Python, small enough for the cache
_GIVE_UP = 20 * _ATTEMPTS  # mazes before the difficulty is called too rare


@dataclass(frozen=True)
class Grid:
    """Cells and their neighbours.

    Args:
        neighbours: Cell on the other side of each side, int64 `[V, D]`; `V` where there is none.
        edges: Number of the edge through each side, int64 `[V, D]`; `E` where there is none.
        orbits: Class of each cell under the symmetries of the grid, int64 `[V]`: cells that a rotation or reflection
            carries into each other have the same number, from 0 on.
        straight: Distance of two cells without walls, in cells, rounded, int64 `[V, V]`.
    """

    neighbours: NDArray[np.int64]
    edges: NDArray[np.int64]
    orbits: NDArray[np.int64]
    straight: NDArray[np.int64]

    @property
    def cells(self) -> int:
        return len(self.neighbours)

    @property
    def sides(self) -> int:
        return self.neighbours.shape[1]


def make_grid(neighbours: NDArray[np.int64], kinds: NDArray[np.int64], straight: NDArray[np.int64]) -> Grid:
    """Give each pair of neighbouring cells one edge number, and each row of `kinds` `[V, n]` one orbit number."""
    cells = len(neighbours)
    here = np.broadcast_to(np.arange(cells)[:, None], neighbours.shape)
    code = np.minimum(here, neighbours) * (cells + 1) + np.maximum(here, neighbours)
    real = neighbours < cells
    names, edges = np.unique(code[real], return_inverse=True)
    table = np.full(neighbours.shape, len(names), dtype=np.int64)
    table[real] = edges
    orbits = np.unique(kinds, axis=0, return_inverse=True)[1]
    return Grid(neighbours, table, orbits.reshape(-1), straight)


def rect_grid(size: int) -> Grid:
    """Square grid of `size * size` cells in row-major order; sides are north, east, south, west."""
    index = np.pad(np.arange(size * size).reshape(size, size), 1, constant_values=size * size)
    sides = (index[:-2, 1:-1], index[1:-1, 2:], index[2:, 1:-1], index[1:-1, :-2])
    edge_gap = np.minimum(np.arange(size), np.arange(size)[::-1])
    gaps = np.stack(np.meshgrid(edge_gap, edge_gap), axis=-1).reshape(-1, 2)
    row, column = np.divmod(np.arange(size * size), size)
    manhattan = abs(row[:, None] - row) + abs(column[:, None] - column)
    return make_grid(np.stack(sides, axis=-1).reshape(-1, 4), np.sort(gaps, axis=1), manhattan)


def ring_sectors(ring: int) -> int:
    """Number of cells in ring `ring = 1, 2, ...`: `8 * 2 ** floor(log2 ring)`, which keeps cells about square."""
    return 8 << (ring.bit_length() - 1)


def circ_grid(rings: int) -> Grid:
    """Concentric rings, cells numbered from the inside; sides are next, previous, inward, outward, second outward."""
    first = np.cumsum([0, *(ring_sectors(ring) for ring in range(1, rings + 1))])
    none = int(first[-1])
    table = np.full((none, 5), none, dtype=np.int64)
    kinds = np.empty((none, 2), dtype=np.int64)
    for ring in range(1, rings + 1):
        sectors, base = ring_sectors(ring), first[ring - 1]
        sector = np.arange(sectors)
        rows = base + sector
        table[rows, 0], table[rows, 1] = base + (sector + 1) % sectors, base + (sector - 1) % sectors
        eighth = sectors // ring_sectors(1)
        kinds[rows, 0], kinds[rows, 1] = ring, np.minimum(sector % eighth, eighth - 1 - sector % eighth)
        if ring > 1:
            ratio = sectors // ring_sectors(ring - 1)
            table[rows, 2] = first[ring - 2] + sector // ratio
        if ring < rings:
            ratio = ring_sectors(ring + 1) // sectors
            for child in range(ratio):
                table[rows, 3 + child] = first[ring] + ratio * sector + child
    turn = np.concatenate([(np.arange(n) + 0.5) / n for n in map(ring_sectors, range(1, rings + 1))])
    place = (kinds[:, 0] + 0.5) * np.exp(2j * np.pi * turn)
    return make_grid(table, kinds, abs(place[:, None] - place).round().astype(np.int64))


def spanning_trees(
    grid: Grid, start: NDArray[np.int64], rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Grow minimum spanning trees of i.i.d. uniform edge weights by Prim's algorithm, one per row, from `start` `[B]`.

    Returns:
        `parent` `[B, V + 1]` (`V` for the start and in the last column), `depth` `[B, V]` (edges from the start) and
        `order` `[V, B]`, the cells in the order of their insertion.
    """
    batch, cells = len(start), grid.cells
    weights = rng.random((batch, int(grid.edges.max()) + 1), dtype=np.float32)
    weights[:, grid.edges[grid.neighbours == cells]] = np.inf
    key = np.full((batch, cells + 1), np.inf, dtype=np.float32)
    free = np.ones((batch, cells + 1), dtype=bool)
    parent = np.full((batch, cells + 1), cells, dtype=np.int64)
    depth = np.full((batch, cells + 1), -1, dtype=np.int64)
    order = np.empty((cells, batch), dtype=np.int64)
    rows = np.arange(batch)
    key_flat, free_flat, parent_flat, depth_flat, weights_flat = (
        array.reshape(-1) for array in (key, free, parent, depth, weights)
    )
    offset, weight_offset = rows * (cells + 1), rows * weights.shape[1]
    current = start
    for step in range(cells):
        if step:
            current = key[:, :cells].argmin(axis=1)
        here = offset + current
        order[step] = current
        free_flat[here], key_flat[here] = False, np.inf
        depth_flat[here] = depth_flat[offset + parent_flat[here]] + 1
        there = offset[:, None] + grid.neighbours[current]
        weight = weights_flat[weight_offset[:, None] + grid.edges[current]]
        old = key_flat[there]
        better = (weight < old) & free_flat[there]
        key_flat[there] = np.where(better, weight, old)
        parent_flat[there] = np.where(better, current[:, None], parent_flat[there])
    parent[:, cells] = cells
    return parent, depth[:, :cells], order


def subtree_sizes(parent: NDArray[np.int64], order: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number of cells below and including each cell, `[B, V]`."""
    batch, width = parent.shape
    size = np.ones((batch, width), dtype=np.int64)
    flat, offset = size.reshape(-1), np.arange(batch) * width
    for current in order[:0:-1]:
        here = offset + current
        flat[offset + parent.reshape(-1)[here]] += flat[here]
    return size[:, :-1]


def below(parent: NDArray[np.int64], cell: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Mask `[B, V]` of the subtree under and including `cell` `[B]`, by pointer doubling."""
    width = parent.shape[1]
    ancestor = parent.copy()
    np.put_along_axis(ancestor, cell[:, None], cell[:, None], axis=1)
    for _ in range(max(1, (width - 1).bit_length())):
        ancestor = np.take_along_axis(ancestor, ancestor, axis=1)
    return (ancestor == cell[:, None])[:, :-1]


def pick(mask: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.int64]:
    """Uniformly draw the position of one true entry of each row of `mask` `[B, n]`."""
    return np.where(mask, rng.random(mask.shape, dtype=np.float32), -1.0).argmax(axis=1)


def occurs_on_both_sides(key: NDArray[np.int64], side: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Mark entries whose key occurs in their row with both values of `side`; all `[B, V]`."""
    order = key.argsort(axis=1)
    keys, sides = np.take_along_axis(key, order, axis=1), np.take_along_axis(side, order, axis=1)
    first = np.ones(key.shape, dtype=bool)
    first[:, 1:] = keys[:, 1:] != keys[:, :-1]
    group = np.cumsum(first.reshape(-1)) - 1
    count = np.bincount(group)
    lost = np.bincount(group, weights=sides.reshape(-1))
    mixed = ((lost > 0) & (lost < count))[group].reshape(key.shape)
    result = np.empty(key.shape, dtype=bool)
    np.put_along_axis(result, order, mixed, axis=1)
    return result


def grow_mazes(grid: Grid, count: int, low: int, high: int, rng: np.random.Generator) -> Problems:
    """Grow `count` mazes and return those that can be asked about, without label and end.

    A cell's key is its depth, its number of openings, its orbit, and its distance from the start as if there were no
    walls. A maze is kept if some key with a depth in `low..high` occurs on both sides of the cut; one such key is
    drawn, the depth uniformly and then a cell that has it. Neither looks at a label.
    """
    cells, sides = grid.cells, grid.sides
    start = rng.integers(cells, size=count)
    parent, depth, order = spanning_trees(grid, start, rng)
    size = subtree_sizes(parent, order)
    least = cells // 4
    cuttable = (size >= least) & (size <= cells - least)  # the start's subtree is everything, so it is out
    cut = pick(cuttable, rng)
    lost = below(parent, cut)
    np.put_along_axis(parent, cut[:, None], cells, axis=1)

    padded = np.concatenate([grid.neighbours, np.full((1, sides), cells)])[:-1]
    mine = parent[:, :-1, None] == padded[None]
    theirs = parent[:, padded] == np.arange(cells)[None, :, None]
    openings = (mine | theirs) & (padded < cells)[None]
    degree = openings.sum(axis=2)

    rows = np.arange(count)
    asked = (depth >= low) & (depth <= high)
    key = (depth * (sides + 1) + degree) * len(grid.orbits) + grid.orbits
    key = np.where(asked, key * (int(grid.straight.max()) + 1) + grid.straight[start], -1)
    matched = asked & occurs_on_both_sides(key, lost)
    levels = np.zeros((count, high + 2), dtype=bool)
    levels[rows[:, None], np.where(matched, depth, high + 1)] = True
    difficulty = pick(levels[:, :-1], rng)
    wanted = key[rows, pick(matched & (depth == difficulty[:, None]), rng)]
    reached = np.where(lost, NEVER, np.minimum(depth, NEVER)).astype(np.uint8)
    mazes = {
        "start": start.astype(np.int16),
        "openings": (openings << np.arange(sides)).sum(axis=2).astype(np.uint8),
        "distance": reached,
        "difficulty": difficulty.astype(np.int16),
        "eccentricity": np.where(lost, 0, depth).max(axis=1).astype(np.int16),
        "candidates": key == wanted[:, None],
    }
    return rows_of(mazes, np.flatnonzero(matched.any(axis=1) & cuttable.any(axis=1)))


class Maze(Task):
    """Base of the two mazes: a grid of cells and a table that says what each pixel shows.

    Args:
        image_size: Height and width in pixels.
        grid: Cells and neighbours.
        pixel_cell: Cell of each pixel, `[H, W]`; `V` for the background.
        pixel_side: Side of the cell that the pixel belongs to, `[H, W]`; `D` for its interior, `D + 1` for solid wall.
    """

    def __init__(self, image_size: int, grid: Grid, pixel_cell: NDArray, pixel_side: NDArray) -> None:
        super().__init__(image_size)
        self.grid = grid
        self.pixel_cell = pixel_cell.reshape(-1)
        self.pixel_wall = (pixel_cell * (grid.sides + 2) + pixel_side).reshape(-1)

    def longest(self, high: int) -> int:
        """Bound of the steps: the start's side has at most `V - V // 4` cells."""
        return self.grid.cells - self.grid.cells // 4 - 1

    def check(self, low: int, high: int) -> None:
        """Require `1 <= low <= high <= V - V // 4 - 1`, the longest path that a balanced cut leaves."""
        longest = self.longest(high)
        if not 1 <= low <= high <= longest:
            raise ValueError(
                f"difficulty {[low, high]} of {self.name}: expected [low, high] with 1 <= low <= high <= {longest}, "
                f"the longest path that {self.grid.cells} cells allow"
            )
        if longest >= NEVER:
            raise ValueError(f"{self.name} with {self.grid.cells} cells: frames are bytes, use at most 340 cells")

    def draw(self, n: int, low: int, high: int, rng: np.random.Generator) -> Problems:
        """Draw `n` mazes whose end lies `low..high` steps from the start, measured before the cut.

        Raises:
            ValueError: If such mazes are too rare to be found.
        """
        parts: list[Problems] = []
        found, tried = 0, 0
        while found < n:
            if tried >= _GIVE_UP and found < tried / 10000:
                raise ValueError(
                    f"difficulty {[low, high]} of {self.name}: only {found} of {tried} mazes have such paths; "
                    "lower the difficulty or enlarge the maze"
                )
            rate = max(found / tried, 0.02) if tried else 0.8
            count = int(min(_ATTEMPTS, max(64, 1.1 * (n - found) / rate)))
            parts.append(grow_mazes(self.grid, count, low, high, rng))
            found, tried = found + len(parts[-1]["start"]), tried + count
        mazes = rows_of(concatenate(parts), slice(n))
        label = np.arange(n) % 2
        side = (mazes["distance"] != NEVER) == (label == 1)[:, None]
        end = pick(mazes.pop("candidates") & side, rng)
        steps = np.where(label == 1, mazes["difficulty"], mazes["eccentricity"])
        mazes.pop("eccentricity")
        return {**mazes, "end": end.astype(np.int16), "label": label.astype(np.uint8), "steps": steps.astype(np.int16)}

    def pixels(self, problems: Problems) -> Sketch:
        """Look every pixel up: wall unless its side is open, else the colour and the arrival of its cell."""
        n, sides = len(problems["start"]), self.grid.sides
        rows = np.arange(n)
        colour = np.full((n, self.grid.cells + 1), WHITE, dtype=np.uint8)
        colour[rows, problems["start"]], colour[rows, problems["end"]] = BLUE, RED
        arrival = np.full((n, self.grid.cells + 1), NEVER, dtype=np.uint8)
        arrival[:, :-1] = problems["distance"]
        opened = np.zeros((n, self.grid.cells + 1, sides + 2), dtype=bool)
        opened[:, :-1, :sides] = problems["openings"][:, :, None] >> np.arange(sides, dtype=np.uint8) & 1
        opened[:, :, sides] = True
        visible = opened.reshape(n, -1).take(self.pixel_wall, axis=1)
        shape = (n, self.image_size, self.image_size)
        canvas = np.where(visible, colour.take(self.pixel_cell, axis=1), np.uint8(BLACK))
        when = np.where(visible, arrival.take(self.pixel_cell, axis=1), np.uint8(NEVER))
        return Sketch(canvas.reshape(shape), when.reshape(shape))

    def local_cues(self, problems: Problems) -> dict[str, NDArray]:
        """Closed cells, openings at both ends, the size of the start's side, number of walls, and plain distance."""
        rows = np.arange(len(problems["start"]))
        bits = problems["openings"][:, :, None] >> np.arange(self.grid.sides, dtype=np.uint8) & 1
        degree = bits.sum(axis=2)
        elsewhere = degree == 0
        elsewhere[rows, problems["start"]] = elsewhere[rows, problems["end"]] = False
        return {
            "closed cell elsewhere": elsewhere.any(axis=1),
            "cells on the start's side": (problems["distance"] != NEVER).sum(axis=1),
            "openings of the start": problems["openings"][rows, problems["start"]],
            "openings of the end": problems["openings"][rows, problems["end"]],
            "dead ends": (degree == 1).sum(axis=1),
            "junctions": (degree > 2).sum(axis=1),
            "straight distance": self.grid.straight[problems["start"], problems["end"]],
            "end": problems["end"],
            "distance before the cut": problems["difficulty"],
        }

    def global_cues(self, problems: Problems) -> dict[str, NDArray]:
        """Size of the end's component: long paths need large components."""
        inside = (problems["distance"] != NEVER).sum(axis=1)
        return {"cells on the end's side": np.where(problems["label"] == 1, inside, self.grid.cells - inside)}


class RectMaze(Maze):
    """`size * size` cells, each with walls of one pixel on its four sides; a missing wall opens both.

    Args:
        image_size: Height and width in pixels, a multiple of `size`, at least four pixels for a cell.
        size: Cells along one side.
    """

    name: ClassVar[str] = "rect_maze"

    def __init__(self, image_size: int = 24, size: int = 6) -> None:
        if size < 3:
            raise ValueError(f"size={size}: expected at least 3 cells along a side")
        if image_size % size or image_size // size < 4:
            raise ValueError(
                f"image_size={image_size} does not fit {size} cells along a side: expected a multiple of {size}, "
                f"at least {4 * size}"
            )
        cell = image_size // size
        row, column = np.indices((image_size, image_size))
        touches = np.stack(
            [row % cell == 0, column % cell == cell - 1, row % cell == cell - 1, column % cell == 0], axis=-1
        )
        side = np.where(touches.sum(axis=-1) == 0, 4, np.where(touches.sum(axis=-1) == 1, touches.argmax(axis=-1), 5))
        super().__init__(image_size, rect_grid(size), row // cell * size + column // cell, side)
        self.size = size

    @property
    def cell_size(self) -> int:
        return self.image_size // self.size


class CircMaze(Maze):
    """Concentric rings around a solid hub; walls are arcs and radii.

    Args:
        image_size: Height and width in pixels; rings must be at least five pixels wide.
        size: Number of rings.

    Departures:
        Drawn without anti-aliasing: blended colours would hide from the pixels which cells are filled.
    """

    name: ClassVar[str] = "circ_maze"

    def __init__(self, image_size: int = 64, size: int = 4) -> None:
        if size < 2:
            raise ValueError(f"size={size}: expected at least 2 rings")
        width = (image_size / 2 - 0.5) / (size + 1)
        if width < 5:
            raise ValueError(
                f"image_size={image_size} leaves {width:.1f} pixels for each of {size} rings: expected at least 5, "
                f"so an image_size of at least {10 * (size + 1) + 1}"
            )
        grid = circ_grid(size)
        first = np.cumsum([0, *(ring_sectors(ring) for ring in range(1, size + 1))])
        row, column = np.indices((image_size, image_size)) - (image_size - 1) / 2
        radius, angle = np.hypot(row, column), np.arctan2(row, column) % (2 * np.pi)
        ring = np.clip((radius / width).astype(int), 1, size)
        sectors = np.array([1, *(ring_sectors(r) for r in range(1, size + 1))])[ring]
        turn = angle / (2 * np.pi) * sectors
        sector = np.minimum(turn.astype(int), sectors - 1)
        cell = first[ring - 1] + sector
        arc = 2 * np.pi / sectors * radius  # length of the cell along the ring, in pixels
        outer = np.array([ring_sectors(r + 1) // ring_sectors(r) if r < size else 1 for r in range(1, size + 1)])[
            ring - 1
        ]
        half = ((turn - sector) * outer).astype(int)
        gaps = np.stack(
            [(sector + 1 - turn) * arc, (turn - sector) * arc, radius - ring * width, (ring + 1) * width - radius],
            axis=-1,
        )
        near = gaps < 0.75  # half a wall; the neighbour draws the other half
        near[..., 3] |= (ring == size) & (gaps[..., 3] < 1.5)  # nobody draws the other half of the outermost wall
        which = near.argmax(axis=-1)
        which = np.where(which == 3, 3 + half, which)
        side = np.where(near.sum(axis=-1) == 0, 5, np.where(near.sum(axis=-1) == 1, which, 6))
        # A second outward cell starts where its own radial wall may stand: keep that spot closed on this side too.
        edge = (outer == 2) & (abs((turn - sector) - 0.5) * arc < 0.75) & near[..., 3]
        side = np.where(edge | (radius < width), 6, side)
        outside = radius >= (size + 1) * width
        super().__init__(image_size, grid, np.where(outside, grid.cells, cell), np.where(outside, 5, side))
        self.size = size
