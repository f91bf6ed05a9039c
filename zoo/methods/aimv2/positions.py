"""Positions of patches: learned ones that are resized, and fixed ones for any grid."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def axis_positions(count: int, width: int, device: torch.device | None = None) -> Tensor:
    """Fixed positions `0 .. count - 1` along one axis, `[sin | cos]`, float32 `[count, width / 2]`.

    The frequencies are `10000^(-k / (width / 4))`, as in the released code.
    """
    quarter = width // 4
    omega = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64, device=device) / quarter)
    angle = torch.arange(count, dtype=torch.float64, device=device)[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def sincos_positions(rows: int, columns: int, width: int, device: torch.device | None = None) -> Tensor:
    """Fixed positions of the native-resolution encoder, float32 `[rows * columns, width]`.

    The first half of the channels encodes the column, the second the row.
    """
    column = axis_positions(columns, width, device)[None].expand(rows, -1, -1)
    row = axis_positions(rows, width, device)[:, None].expand(-1, columns, -1)
    return torch.cat([column, row], dim=2).flatten(0, 1)


def grid_positions(grid: Tensor, count: int, width: int) -> Tensor:
    """`sincos_positions` for images of different grids: rows and columns `[B, 2]`; float32 `[B, count, width]`."""
    place, columns = torch.arange(count, device=grid.device), grid[:, 1:]
    axis = axis_positions(count, width, grid.device)
    return torch.cat([axis[place % columns], axis[place // columns]], dim=2)


def resize_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Interpolate positions `[h w, D]` of a grid to another one, bicubic; the same tensor if the grids are equal."""
    if old == new:
        return positions
    grid = positions.float().unflatten(0, old).permute(2, 0, 1)[None]
    grid = F.interpolate(grid, size=new, mode="bicubic", antialias=True)
    return grid[0].flatten(1).T.to(positions.dtype)
