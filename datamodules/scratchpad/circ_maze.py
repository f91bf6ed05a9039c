"""Mazes of concentric rings."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from datamodules.scratchpad.grids import Grid, make_grid
from datamodules.scratchpad.mazes import Maze


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
