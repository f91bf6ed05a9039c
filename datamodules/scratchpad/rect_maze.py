"""Mazes of square cells."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from datamodules.scratchpad.grids import Grid, make_grid
from datamodules.scratchpad.mazes import Maze


def rect_grid(size: int) -> Grid:
    """Square grid of `size * size` cells in row-major order; sides are north, east, south, west."""
    index = np.pad(np.arange(size * size).reshape(size, size), 1, constant_values=size * size)
    sides = (index[:-2, 1:-1], index[1:-1, 2:], index[2:, 1:-1], index[1:-1, :-2])
    row, column = np.divmod(np.arange(size * size), size)
    manhattan = 1.0 * abs(row[:, None] - row) + abs(column[:, None] - column)
    cell = np.arange(size * size).reshape(size, size)
    turned = [np.rot90(picture, quarter).ravel() for picture in (cell, cell.T) for quarter in range(4)]
    return make_grid(np.stack(sides, axis=-1).reshape(-1, 4), np.stack(turned), manhattan)


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
