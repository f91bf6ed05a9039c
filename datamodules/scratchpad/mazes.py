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

import numpy as np
from numpy.typing import NDArray

from datamodules.scratchpad.grids import Grid, below, spanning_trees, subtree_sizes, tree_distances
from datamodules.scratchpad.tasks import BLACK, BLUE, NEVER, RED, WHITE, Problems, Sketch, Task, concatenate, rows_of

_ATTEMPTS = 2048  # mazes grown at once: large enough to hide the cost of Python, small enough for the cache
_GIVE_UP = 20 * _ATTEMPTS  # mazes before the difficulty is called too rare


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
