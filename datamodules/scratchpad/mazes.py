"""Rectangular and circular mazes: is the red cell reachable from the blue one?

Walls come first, the label second, so that no local cue tells the label. A maze is a random spanning tree with one edge
cut; the end is drawn from the start's side or from the lost side, from cells that agree in distance (in the uncut
tree), in their place and open sides up to symmetry, in their distance from the start without walls, and in how many
open sides of either lead nearer to the other. Both classes then have the same law of walls, start and all of these.
Less is not enough. In mazes of 6 x 6 cells with distance and number of openings matched, the cell of the end alone
answers 61 % of the questions, as the lost side lies nearer to the border; with its place matched, the distance without
walls answers 54 %; with that matched, the start's open sides that lead nearer answer 57 %.
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
        views: Class of each cell with each set of open sides, as bits, under the symmetries of the grid, int64
            `[V, 2 ** D]`: what a rotation or reflection carries into each other has the same number, from 0 on.
        straight: Distance of two cells without walls, in cells, rounded, int64 `[V, V]`.
        nearer: Whether side `d` of cell `v` leads nearer, without walls, to cell `w`; bool `[w, v, d]`.
    """

    neighbours: NDArray[np.int64]
    edges: NDArray[np.int64]
    views: NDArray[np.int64]
    straight: NDArray[np.int64]
    nearer: NDArray[np.bool_]

    @property
    def cells(self) -> int:
        return len(self.neighbours)

    @property
    def sides(self) -> int:
        return self.neighbours.shape[1]


def make_grid(neighbours: NDArray[np.int64], symmetries: NDArray[np.int64], apart: NDArray[np.floating]) -> Grid:
    """Number the edges between neighbouring cells, and the views of a cell.

    Args:
        neighbours: As in `Grid`.
        symmetries: Cell that each cell is carried into by each element of the group of symmetries, `[G, V]`.
        apart: Distance of two cells without walls, in cells, `[V, V]`.
    """
    cells, sides = neighbours.shape
    here = np.broadcast_to(np.arange(cells)[:, None], neighbours.shape)
    code = np.minimum(here, neighbours) * (cells + 1) + np.maximum(here, neighbours)
    real = neighbours < cells
    names, edges = np.unique(code[real], return_inverse=True)
    table = np.full(neighbours.shape, len(names), dtype=np.int64)
    table[real] = edges
    opened = np.arange(1 << sides)[:, None] >> np.arange(sides) & 1
    least = np.full((cells, 1 << sides), np.iinfo(np.int64).max)
    for image in symmetries:
        moved = np.append(image, cells)[neighbours]
        side = (moved[:, :, None] == neighbours[image][:, None]).argmax(axis=2)
        least = np.minimum(least, (image[:, None] << sides) + (opened << side[:, None]).sum(axis=2))
    views = np.unique(least, return_inverse=True)[1].reshape(least.shape)
    beyond = np.append(apart, np.full((1, cells), np.inf), axis=0)
    nearer = beyond[neighbours] < apart[:, None] - 1e-9
    return Grid(
        neighbours, table, views, apart.round().astype(np.int64), np.ascontiguousarray(nearer.transpose(2, 0, 1))
    )


def rect_grid(size: int) -> Grid:
    """Square grid of `size * size` cells in row-major order; sides are north, east, south, west."""
    index = np.pad(np.arange(size * size).reshape(size, size), 1, constant_values=size * size)
    sides = (index[:-2, 1:-1], index[1:-1, 2:], index[2:, 1:-1], index[1:-1, :-2])
    row, column = np.divmod(np.arange(size * size), size)
    manhattan = 1.0 * abs(row[:, None] - row) + abs(column[:, None] - column)
    cell = np.arange(size * size).reshape(size, size)
    turned = [np.rot90(picture, quarter).ravel() for picture in (cell, cell.T) for quarter in range(4)]
    return make_grid(np.stack(sides, axis=-1).reshape(-1, 4), np.stack(turned), manhattan)


def ring_sectors(ring: int) -> int:
    """Number of cells in ring `ring = 1, 2, ...`: `8 * 2 ** floor(log2 ring)`, which keeps cells about square."""
    return 8 << (ring.bit_length() - 1)


def circ_grid(rings: int) -> Grid:
    """Concentric rings, cells numbered from the inside; sides are next, previous, inward, outward, second outward."""
    first = np.cumsum([0, *(ring_sectors(ring) for ring in range(1, rings + 1))])
    none = int(first[-1])
    table = np.full((none, 5), none, dtype=np.int64)
    symmetries = np.empty((16, none), dtype=np.int64)
    for ring in range(1, rings + 1):
        sectors, base = ring_sectors(ring), first[ring - 1]
        sector = np.arange(sectors)
        rows = base + sector
        table[rows, 0], table[rows, 1] = base + (sector + 1) % sectors, base + (sector - 1) % sectors
        turned = sector + np.arange(8)[:, None] * (sectors // 8)
        symmetries[:, rows] = base + np.concatenate([turned, -1 - turned]) % sectors
        if ring > 1:
            ratio = sectors // ring_sectors(ring - 1)
            table[rows, 2] = first[ring - 2] + sector // ratio
        if ring < rings:
            ratio = ring_sectors(ring + 1) // sectors
            for child in range(ratio):
                table[rows, 3 + child] = first[ring] + ratio * sector + child
    turn = np.concatenate([(np.arange(n) + 0.5) / n for n in map(ring_sectors, range(1, rings + 1))])
    ring_of = np.repeat(np.arange(rings), np.diff(first))
    place = (ring_of + 1.5) * np.exp(2j * np.pi * turn)
    return make_grid(table, symmetries, abs(place[:, None] - place))


def spanning_trees(grid: Grid, count: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Grow `B = count` minimum spanning trees of i.i.d. uniform edge weights by Prim's algorithm, from cell 0.

    Returns:
        `parent` `[B, V + 1]` (`V` for cell 0 and in the last column) and `order` `[V, B]`, the cells in the order of
        their insertion.
    """
    cells = grid.cells
    weights = rng.random((count, int(grid.edges.max()) + 1), dtype=np.float32)
    weights[:, grid.edges[grid.neighbours == cells]] = np.inf
    key = np.full((count, cells + 1), np.inf, dtype=np.float32)
    free = np.ones((count, cells + 1), dtype=bool)
    parent = np.full((count, cells + 1), cells, dtype=np.int64)
    order = np.zeros((cells, count), dtype=np.int64)
    rows = np.arange(count)
    key_flat, free_flat, parent_flat, weights_flat = (array.reshape(-1) for array in (key, free, parent, weights))
    offset, weight_offset = rows * (cells + 1), rows * weights.shape[1]
    for step in range(cells):
        current = key[:, :cells].argmin(axis=1)  # all infinite at first: cell 0
        here = offset + current
        order[step] = current
        free_flat[here], key_flat[here] = False, np.inf
        there = offset[:, None] + grid.neighbours[current]
        weight = weights_flat[weight_offset[:, None] + grid.edges[current]]
        old = key_flat[there]
        better = (weight < old) & free_flat[there]
        key_flat[there] = np.where(better, weight, old)
        parent_flat[there] = np.where(better, current[:, None], parent_flat[there])
    parent[:, cells] = cells
    return parent, order


def tree_distances(parent: NDArray[np.int64], order: NDArray[np.int64]) -> NDArray[np.unsignedinteger]:
    """Number of edges between all pairs of cells, `[B, V, V]`."""
    cells, count = order.shape
    rows = np.arange(count)
    distance = np.zeros((count, cells, cells), dtype=np.min_scalar_type(cells - 1))
    for current in order[1:]:
        row = distance[rows, parent[rows, current]] + np.uint8(1)  # right for the cells inserted so far
        distance[rows, current] = row
        distance[rows, :, current] = row
        distance[rows, current, current] = 0
    return distance


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
    """Mark entries whose key is not negative and occurs in their row with both values of `side`; all `[B, V]`."""
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
    return result & (key >= 0)


def _combine(key: NDArray[np.int64], *parts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Number the combinations of whole numbers from 0 on."""
    for part in parts:
        key = key * (int(part.max(initial=0)) + 1) + part
    return key


def grow_mazes(grid: Grid, count: int, low: int, high: int, rng: np.random.Generator) -> Problems:
    """Grow `count` trees, cut them, and return those that can be asked about, without label and end.

    A cell's key is its distance from the start, its view (place and open sides, up to symmetry), its distance from the
    start as if there were no walls, and how many of its open sides lead nearer to the start, and of the start's nearer
    to it. A tree is kept if it has a start for which some key with a distance in `low..high` occurs on both sides of
    the cut. Starts are tried in random order until one is found; one of its keys is drawn, the distance uniformly and
    then a cell that has it. Nothing looks at a label.
    """
    cells, sides = grid.cells, grid.sides
    parent, order = spanning_trees(grid, count, rng)
    distances = tree_distances(parent, order)
    size = subtree_sizes(parent, order)
    least = cells // 4
    cuttable = (size >= least) & (size <= cells - least)  # the subtree of cell 0 is everything, so it is out
    cut = pick(cuttable, rng)
    half = below(parent, cut)
    np.put_along_axis(parent, cut[:, None], cells, axis=1)

    padded = np.concatenate([grid.neighbours, np.full((1, sides), cells)])[:-1]
    mine = parent[:, :-1, None] == padded[None]
    theirs = parent[:, padded] == np.arange(cells)[None, :, None]
    openings = (mine | theirs) & (padded < cells)[None]
    code = (openings << np.arange(sides)).sum(axis=2)
    view = grid.views[np.arange(cells), code]

    asked: NDArray[np.bool_] = (distances >= low) & (distances <= high)
    together: NDArray[np.bool_] = np.equal(half[:, :, None], half[:, None])
    possible: NDArray[np.bool_] = np.any(asked & together, axis=2) & np.any(asked & ~together, axis=2)
    possible &= cuttable.any(axis=1, keepdims=True)
    found: list[Problems] = []
    pending = np.flatnonzero(possible.any(axis=1))
    while len(pending):
        start = pick(possible[pending], rng)
        possible[pending, start] = False
        coarse = _combine(distances[pending, start].astype(np.int64), view[pending], grid.straight[start])
        coarse = np.where(asked[pending, start], coarse, -1)
        good = np.flatnonzero(occurs_on_both_sides(coarse, together[pending, start]).any(axis=1))
        # the costlier part of the key for those only that pass without it
        tree, start = pending[good], start[good]
        leaving = (grid.nearer[:, start].swapaxes(0, 1) & openings[tree, start][:, None]).sum(axis=2)
        arriving = (grid.nearer[start] & openings[tree]).sum(axis=2)
        key = np.where(coarse[good] >= 0, _combine(coarse[good], leaving, arriving), -1)
        matched = occurs_on_both_sides(key, together[tree, start])
        good = np.flatnonzero(matched.any(axis=1))
        tree, start, key, matched = tree[good], start[good], key[good], matched[good]
        depth, lost = distances[tree, start].astype(np.int64), ~together[tree, start]
        levels = np.zeros((len(good), high + 2), dtype=bool)
        np.put_along_axis(levels, np.where(matched, depth, high + 1), True, axis=1)
        difficulty = pick(levels[:, :-1], rng)
        wanted = np.take_along_axis(key, pick(matched & (depth == difficulty[:, None]), rng)[:, None], axis=1)
        found.append(
            {
                "tree": tree,
                "start": start.astype(np.int16),
                "openings": code[tree].astype(np.uint8),
                "distance": np.where(lost, NEVER, np.minimum(depth, NEVER)).astype(np.uint8),
                "difficulty": difficulty.astype(np.int16),
                "eccentricity": np.where(lost, 0, depth).max(axis=1, initial=0).astype(np.int16),
                "candidates": key == wanted,
            }
        )
        possible[tree] = False
        pending = pending[possible[pending].any(axis=1)]
    if not found:
        return {}
    mazes = concatenate(found)
    return rows_of(mazes, mazes.pop("tree").argsort())  # not the easy ones first


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
            most = min(_ATTEMPTS, 2**24 // self.grid.cells**2)  # a matrix of distances for each tree
            count = int(min(most, max(64, 1.1 * (n - found) / rate)))
            if mazes := grow_mazes(self.grid, count, low, high, rng):
                parts.append(mazes)
                found += len(mazes["start"])
            tried += count
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
            "open sides of start and end that lead nearer": (
                10 * (self.grid.nearer[problems["end"], problems["start"]] & bits[rows, problems["start"]]).sum(axis=1)
                + (self.grid.nearer[problems["start"], problems["end"]] & bits[rows, problems["end"]]).sum(axis=1)
            ),
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
