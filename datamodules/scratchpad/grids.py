"""Grids of cells, and random spanning trees on them, many at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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
